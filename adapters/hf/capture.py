"""Run a module's own forward with its decoder layers intercepted, and note what they are handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errata.adapters.hf.replicas import replaced_forwards
from errata.functional.errors import UnsupportedModelError

__all__ = [
    "CapturedForward",
    "ForwardTrace",
    "LayerCall",
    "OutputFormat",
    "capture_forward",
    "run_until",
    "trace_forward",
    "with_parameters",
]


class LayerCall(NamedTuple):
    """The arguments of a layer other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_as_keyword: bool  # hidden states came as a keyword


class CapturedForward(NamedTuple):
    """What a forward hands its layers."""

    hidden_states: Tensor  # [B L D] before layer 0
    layer_calls: tuple[LayerCall, ...]  # per layer
    added: dict[int, Tensor]  # [B L D] what the model adds after a layer
    position_ids: Tensor | None  # position ids as the decoder was given them, if it was


class OutputFormat(NamedTuple):
    """How a module gives its tensor: bare (size 0) or first of a tuple of `size`."""

    tuple_size: int = 0

    def wrap(self, value: Tensor) -> Any:
        """Wrap hidden states as the layer would return them.

        Args:
            value: Hidden states.

        Returns:
            The tensor, or a tuple that starts with it.
        """
        return value if not self.tuple_size else (value, *(None,) * (self.tuple_size - 1))

    @classmethod
    def from_output(cls, output: Any) -> OutputFormat:
        """Read the format off an output.

        Args:
            output: What a layer returned.

        Returns:
            Its format.
        """
        return cls(0 if isinstance(output, Tensor) else len(output))


class ForwardTrace(NamedTuple):
    """What one free forward tells about a module."""

    layer_formats: tuple[OutputFormat, ...]  # how each layer gives its result
    attention_formats: tuple[OutputFormat, ...]  # how each layer's attention does
    tail: tuple[str, ...]  # paths called after the last layer, the head last
    mutated_attributes: tuple[tuple[str, str], ...]  # (path, attribute) that a forward changes
    noise: Tensor  # [B L D] what the last layer was made to give
    logits: Tensor  # [B L V] what the model made of it


class _StopForward(BaseException):
    """Ends a forward once the layers have been passed."""


class _CallInside(nn.Module):
    """Lets functional_call run any function of a module, not just its forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        return run(self.inner)


def with_parameters(
    module: nn.Module, params: Mapping[str, Tensor], run: Callable[[nn.Module], Any]
):
    """Call a function while a module's parameters are replaced.

    Args:
        module: The module; unchanged afterwards.
        params: Parameters by name.
        run: Called with the module.

    Returns:
        What `run` returns.
    """
    named = {f"inner.{name}": tensor for name, tensor in params.items()}
    return functional_call(_CallInside(module), named, (run,), tie_weights=False)


def capture_forward(
    replica: nn.Module,
    layers: Sequence[nn.Module],
    after: nn.Module,
    layer_formats: Sequence[OutputFormat],
    decoder: nn.Module,
    run: Callable[[], Any],
) -> CapturedForward:
    """Run a forward whose layers return zeros, up to the module after the layers.

    The input of each next layer is then exactly what the model adds in between.

    Args:
        replica: A copy of the module that shares its parameters.
        layers: Decoder layers.
        after: The module called after the layers.
        layer_formats: Output format of each layer.
        decoder: The decoder.
        run: Runs the forward.

    Returns:
        Arguments of every layer, and what is added between them.
    """
    layer_calls: list[LayerCall] = []
    added: dict[int, Tensor] = {}
    first_hidden: list[Tensor] = []
    stub_outputs: list[Tensor] = []
    position_ids: list[Tensor] = []

    def record_arrival(hidden_states: Tensor) -> None:
        if not stub_outputs:
            first_hidden.append(hidden_states)
        elif hidden_states is not stub_outputs[-1]:
            added[len(stub_outputs) - 1] = hidden_states

    def make_stub(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(layer_calls) != number:
                raise UnsupportedModelError(
                    f"{type(replica).__name__} must run its layers once each, in order; layer "
                    f"{number} was called as number {len(layer_calls)}."
                )
            hidden_states, layer_call = _split_hidden_states(args, kwargs)
            record_arrival(hidden_states)
            layer_calls.append(layer_call)
            stub_outputs.append(torch.zeros_like(hidden_states))
            return layer_formats[number].wrap(stub_outputs[-1])

        return forward

    def stop(*args: Any, **kwargs: Any) -> Any:
        record_arrival(_split_hidden_states(args, kwargs)[0])
        raise _StopForward

    def record_position_ids(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(kwargs.get("position_ids"), Tensor):
            position_ids.append(kwargs["position_ids"])

    hook = decoder.register_forward_pre_hook(record_position_ids, with_kwargs=True)
    try:
        with replaced_forwards([*layers, after], [*map(make_stub, range(len(layers))), stop]):
            run()
    except _StopForward:
        pass
    finally:
        hook.remove()
    if len(layer_calls) != len(layers):
        raise UnsupportedModelError(
            f"{type(replica).__name__} must run all of its {len(layers)} layers; it ran "
            f"{len(layer_calls)}."
        )
    return CapturedForward(
        first_hidden[0], tuple(layer_calls), added, position_ids[-1] if position_ids else None
    )


def run_until(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Run a forward until a module has returned; nothing after it runs.

    Args:
        module: The module to stop at.
        run: Runs the forward.

    Returns:
        The module's output.
    """
    outputs: list[Tensor] = []

    def record_and_stop(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])
        raise _StopForward

    hook = module.register_forward_hook(record_and_stop)
    try:
        run()
    except _StopForward:
        pass
    finally:
        hook.remove()
    return outputs[0]


def trace_forward(
    replica: nn.Module,
    layers: Sequence[nn.Module],
    attentions: Sequence[nn.Module | None],
    head: nn.Module,
    run: Callable[[], Any],
) -> ForwardTrace:
    """Trace one forward whose layers return noise; one layer of each class runs, for its format.

    Args:
        replica: A copy of the module that shares its parameters.
        layers: Decoder layers.
        attentions: Self-attention of each layer, or None.
        head: The output head.
        run: Runs the forward.

    Returns:
        Formats, and the modules between the last layer and the head.

    Raises:
        UnsupportedModelError: If the forward does not end with the head.
    """
    formats_by_class: dict[type, OutputFormat] = {}
    attention_formats_by_class: dict[type, OutputFormat] = {}
    noise: list[Tensor] = []
    paths = {part: path for path, part in replica.named_modules()}
    layer_modules = {part for layer in layers for part in layer.modules()}
    generator = torch.Generator().manual_seed(0)

    def make_stub(layer: nn.Module, attention: nn.Module | None) -> Callable[..., Any]:
        original = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_states, _ = _split_hidden_states(args, kwargs)
            if type(layer) not in formats_by_class:
                hooks = []
                if attention is not None:
                    record_format = _make_format_hook(attention_formats_by_class, type(layer))
                    hooks.append(attention.register_forward_hook(record_format))
                try:
                    formats_by_class[type(layer)] = OutputFormat.from_output(
                        original(*args, **kwargs)
                    )
                finally:
                    for hook in hooks:
                        hook.remove()
            random = torch.randn(
                hidden_states.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            noise.append(random.to(hidden_states.device, hidden_states.dtype))
            return formats_by_class[type(layer)].wrap(noise[-1])

        return forward

    tail: list[str] = []
    open_calls: list[nn.Module] = []

    def enter_module(module: nn.Module, args: tuple) -> None:
        if len(noise) == len(layers):
            if not open_calls:
                tail.append(paths[module])
            open_calls.append(module)

    def leave_module(module: nn.Module, args: tuple, output: Any) -> None:
        if open_calls and open_calls[-1] is module:
            open_calls.pop()

    hooks = []
    for part in paths:
        if part not in layer_modules:
            hooks.append(part.register_forward_pre_hook(enter_module))
            hooks.append(part.register_forward_hook(leave_module))
    attributes_before = {part: dict(vars(part)) for part in paths}
    try:
        with replaced_forwards(list(layers), list(map(make_stub, layers, attentions))):
            output = run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(noise) != len(layers):
        raise UnsupportedModelError(
            f"{type(replica).__name__} must run each of its {len(layers)} layers once; they ran "
            f"{len(noise)} times."
        )
    if paths[head] not in tail:
        raise UnsupportedModelError(
            f"{type(replica).__name__} must end in its head {paths[head]!r}; after the layers it "
            f"called {', '.join(tail) or 'nothing'}."
        )
    return ForwardTrace(
        layer_formats=tuple(formats_by_class[type(layer)] for layer in layers),
        attention_formats=tuple(
            attention_formats_by_class.get(type(layer), OutputFormat()) for layer in layers
        ),
        tail=tuple(tail[: tail.index(paths[head]) + 1]),
        mutated_attributes=_changed_attributes(paths, attributes_before),
        noise=noise[-1],
        logits=output.logits,
    )


def _make_format_hook(
    formats_by_class: dict[type, OutputFormat], layer_class: type
) -> Callable[..., None]:
    def record_format(module: nn.Module, args: tuple, output: Any) -> None:
        formats_by_class[layer_class] = OutputFormat.from_output(output)

    return record_format


def _split_hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    if args:
        return args[0], LayerCall(args[1:], dict(kwargs), False)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), LayerCall((), rest, True)


def _changed_attributes(
    paths: Mapping[nn.Module, str], before: Mapping[nn.Module, Mapping[str, Any]]
) -> tuple[tuple[str, str], ...]:
    """Plain attributes that the forward set: state that must not leak into the next call."""
    return tuple(
        (path, name)
        for part, path in paths.items()
        for name, value in vars(part).items()
        if not name.startswith("_") and name != "forward" and value is not before[part].get(name)
    )
