"""Run a module's own forward with its decoder layers intercepted, and note what they are handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errata.functional.errors import ModelUnsupported

from .skeleton import replaced

__all__ = ["Capture", "Found", "Handed", "Shape", "capture", "discover", "stopped_at", "swapped"]


class Handed(NamedTuple):
    """What a layer is called with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool  # hidden states came as a keyword


class Capture(NamedTuple):
    """What a forward hands its layers."""

    hidden: Tensor  # [B L D] before layer 0
    handed: tuple[Handed, ...]  # per layer
    added: dict[int, Tensor]  # [B L D] what the model adds after a layer
    positions: Tensor | None  # position ids as the decoder was given them, if it was


class Shape(NamedTuple):
    """How a module gives its tensor: bare (size 0) or first of a tuple of `size`."""

    size: int = 0

    def of(self, value: Tensor) -> Any:
        return value if not self.size else (value, *(None,) * (self.size - 1))

    @classmethod
    def like(cls, output: Any) -> Shape:
        return cls(0 if isinstance(output, Tensor) else len(output))


class Found(NamedTuple):
    """What one free forward tells about a module."""

    layers: tuple[Shape, ...]  # how each layer gives its result
    attention: tuple[Shape, ...]  # how each layer's attention does
    tail: tuple[str, ...]  # paths called after the last layer, the head last
    state: tuple[tuple[str, str], ...]  # (path, attribute) that a forward changes
    noise: Tensor  # [B L D] what the last layer was made to give
    logits: Tensor  # [B L V] what the model made of it


class _Stop(BaseException):
    """Ends a forward once the layers have been passed."""


class _Entry(nn.Module):
    """Lets functional_call run any function of a module, not just its forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        return run(self.inner)


def swapped(module: nn.Module, params: Mapping[str, Tensor], run: Callable[[nn.Module], Any]):
    """`run(module)` while the module's parameters are `params`."""
    named = {f"inner.{name}": tensor for name, tensor in params.items()}
    return functional_call(_Entry(module), named, (run,), tie_weights=False)


def capture(
    skeleton: nn.Module,
    layers: Sequence[nn.Module],
    after: nn.Module,
    shapes: Sequence[Shape],
    decoder: nn.Module,
    run: Callable[[], Any],
) -> Capture:
    """Run until the module `after` the layers is called; every layer gives zeros instead.

    So what arrives at the next layer is exactly what the model adds in between.
    """
    handed: list[Handed] = []
    added: dict[int, Tensor] = {}
    first: list[Tensor] = []
    given: list[Tensor] = []
    positions: list[Tensor] = []

    def arrive(hidden: Tensor) -> None:
        if not given:
            first.append(hidden)
        elif hidden is not given[-1]:
            added[len(given) - 1] = hidden

    def stand_in(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(handed) != number:
                raise ModelUnsupported(
                    f"{type(skeleton).__name__} must run its layers once each, in order; layer "
                    f"{number} was called as number {len(handed)}."
                )
            hidden, rest = _split(args, kwargs)
            arrive(hidden)
            handed.append(rest)
            given.append(torch.zeros_like(hidden))
            return shapes[number].of(given[-1])

        return forward

    def stop(*args: Any, **kwargs: Any) -> Any:
        arrive(_split(args, kwargs)[0])
        raise _Stop

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(kwargs.get("position_ids"), Tensor):
            positions.append(kwargs["position_ids"])

    hook = decoder.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with replaced([*layers, after], [*map(stand_in, range(len(layers))), stop]):
            run()
    except _Stop:
        pass
    finally:
        hook.remove()
    if len(handed) != len(layers):
        raise ModelUnsupported(
            f"{type(skeleton).__name__} must run all of its {len(layers)} layers; it ran "
            f"{len(handed)}."
        )
    return Capture(first[0], tuple(handed), added, positions[-1] if positions else None)


def stopped_at(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Run until `module` has given its output, and return that; nothing behind it runs."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _Stop

    hook = module.register_forward_hook(note)
    try:
        run()
    except _Stop:
        pass
    finally:
        hook.remove()
    return seen[0]


def discover(
    skeleton: nn.Module,
    layers: Sequence[nn.Module],
    attentions: Sequence[nn.Module | None],
    head: nn.Module,
    run: Callable[[], Any],
) -> Found:
    """One free forward in which layers give noise; one layer of each class runs for its shape.

    Raises ModelUnsupported where the head is not what ends the forward.
    """
    shapes: dict[type, Shape] = {}
    inside: dict[type, Shape] = {}
    noise: list[Tensor] = []
    paths = {part: path for path, part in skeleton.named_modules()}
    below = {part for layer in layers for part in layer.modules()}
    generator = torch.Generator().manual_seed(0)

    def stand_in(layer: nn.Module, attention: nn.Module | None) -> Callable[..., Any]:
        original = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = _split(args, kwargs)
            if type(layer) not in shapes:
                hooks = []
                if attention is not None:
                    note = _noting(inside, type(layer))
                    hooks.append(attention.register_forward_hook(note))
                try:
                    shapes[type(layer)] = Shape.like(original(*args, **kwargs))
                finally:
                    for hook in hooks:
                        hook.remove()
            random = torch.randn(hidden.shape, generator=generator)
            noise.append(random.to(hidden.device, hidden.dtype))
            return shapes[type(layer)].of(noise[-1])

        return forward

    tail: list[str] = []
    open_calls: list[nn.Module] = []

    def before(module: nn.Module, args: tuple) -> None:
        if len(noise) == len(layers):
            if not open_calls:
                tail.append(paths[module])
            open_calls.append(module)

    def behind(module: nn.Module, args: tuple, output: Any) -> None:
        if open_calls and open_calls[-1] is module:
            open_calls.pop()

    hooks = []
    for part in paths:
        if part not in below:
            hooks.append(part.register_forward_pre_hook(before))
            hooks.append(part.register_forward_hook(behind))
    plain = {part: dict(vars(part)) for part in paths}
    try:
        with replaced(list(layers), list(map(stand_in, layers, attentions))):
            output = run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(noise) != len(layers):
        raise ModelUnsupported(
            f"{type(skeleton).__name__} must run each of its {len(layers)} layers once; they ran "
            f"{len(noise)} times."
        )
    if paths[head] not in tail:
        raise ModelUnsupported(
            f"{type(skeleton).__name__} must end in its head {paths[head]!r}; after the layers it "
            f"called {', '.join(tail) or 'nothing'}."
        )
    return Found(
        layers=tuple(shapes[type(layer)] for layer in layers),
        attention=tuple(inside.get(type(layer), Shape()) for layer in layers),
        tail=tuple(tail[: tail.index(paths[head]) + 1]),
        state=_changed(paths, plain),
        noise=noise[-1],
        logits=output.logits,
    )


def _noting(into: dict[type, Shape], kind: type) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple, output: Any) -> None:
        into[kind] = Shape.like(output)

    return note


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Handed]:
    if args:
        return args[0], Handed(args[1:], dict(kwargs), False)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Handed((), rest, True)


def _changed(
    paths: Mapping[nn.Module, str], before: Mapping[nn.Module, Mapping[str, Any]]
) -> tuple[tuple[str, str], ...]:
    """Plain attributes that the forward set: state that must not leak into the next call."""
    return tuple(
        (path, name)
        for part, path in paths.items()
        for name, value in vars(part).items()
        if not name.startswith("_") and name != "forward" and value is not before[part].get(name)
    )
