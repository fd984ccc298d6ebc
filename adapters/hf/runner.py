"""What is known about one module, and how its parts are run with other parameters.

The parts are: everything before the layers (run by the module's own forward, intercepted), each
layer, and the modules after them. All run on the calling thread's replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errata.adapters.families.base import Family
from errata.adapters.hf.attention import EXPLICIT_ATTENTION
from errata.adapters.hf.capture import (
    CapturedForward,
    capture_forward,
    trace_forward,
    with_parameters,
)
from errata.adapters.hf.kv_cache import FunctionalKVCache
from errata.adapters.hf.layout import ATTENTION_OUTPUT, added_input_key, infer_layout
from errata.adapters.hf.logit_transform import find_logit_transform
from errata.adapters.hf.replicas import ThreadReplicas, replaced_forwards
from errata.adapters.hf.structure import attention_path, decoder_path, text_config
from errata.adapters.hf.synthetic_inputs import (
    FIRST_SHAPE,
    LONG_SHAPE,
    SECOND_SHAPE,
    empty_cache,
    hf_position_ids,
    observed_positions,
    synthetic_tokens,
)
from errata.adapters.hf.vision_cache import VisionFeatureCache
from errata.functional import Hooks, Inputs, KVCache, ModelCard, Params
from errata.functional.errors import UnknownSiteError, UnsupportedModelError
from errata.functional.forward.hooks import first_tensor, forward_hooks
from errata.functional.forward.spans import spanned

__all__ = ["HF_ERRORS", "ModuleRunner"]

HF_ERRORS = (
    AttributeError,
    AssertionError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What running somebody else's forward with unusual arguments can raise."""


class ModuleRunner:
    """A module's parts: where they are, what they are handed, how to run them.

    Found once by a free forward and two captures of a few tokens, in which no layer runs but one
    of each class. Raises UnsupportedModelError with the reason where a cut could not be carried.
    """

    def __init__(
        self, card: ModelCard, module: Any, family: Family, attention: str = EXPLICIT_ATTENTION
    ) -> None:
        self.card = card
        self.family = family
        self.decoder = decoder_path(module)
        self._replicas = ThreadReplicas(module, self.decoder, attention)
        self._module_paths = {path for path, _ in module.named_modules()}
        stack = module.get_submodule(card.layers)
        self.attention_paths = tuple(attention_path(layer) for layer in stack)
        self._layer_params = [
            self._parameter_names(module, f"{card.layers}.{number}")
            for number in range(card.num_layers)
        ]
        inside = card.layers + "."
        self._outer_params = {
            name: card.tied.get(str(name), str(name))
            for name, _ in module.named_parameters(remove_duplicate=False)
            if not name.startswith(inside)
        }
        tower = [
            name
            for name in self._outer_params
            if card.vision_tower and name.startswith(card.vision_tower)
        ]
        held = card.tied.get(f"{card.token_embedding}.weight", f"{card.token_embedding}.weight")
        self._placement_params = (held, *tower[:1])  # of the embedding, of the tower
        with torch.no_grad():
            self._probe(module)

    def replica(self) -> nn.Module:
        """The calling thread's own tree of modules over the base's weights."""
        return self._replicas.get()

    def forward_arguments(self, replica: nn.Module, inputs: Inputs) -> tuple[dict, Tensor | None]:
        """Keyword arguments of the module's forward.

        Args:
            replica: A copy of the module that shares its parameters.
            inputs: Preprocessed rows.

        Returns:
            Keyword arguments, and positions [B P L] where the family computes them.
        """
        kwargs = self.family.forward_arguments(replica, inputs)
        if self.family.position_ids is None:
            return kwargs, None
        position_ids = self.family.position_ids(replica, inputs)
        return {**kwargs, "position_ids": hf_position_ids(position_ids)}, position_ids

    def capture_inputs(
        self,
        replica: nn.Module,
        params: Params,
        inputs: Inputs,
        hooks: Hooks | None = None,
        vision_cache: VisionFeatureCache | None = None,
    ) -> tuple[CapturedForward, Tensor, Inputs]:
        """Capture what the layers are called with.

        Args:
            replica: A copy of the module that shares its parameters.
            params: Parameters by name.
            inputs: Preprocessed rows.
            hooks: Hooks on outputs of modules, by path.
            vision_cache: Cache of image features, used if it serves these parameters.

        Returns:
            The captured calls, positions [B P L], and the inputs on the model's device.
        """
        inputs = self._to_device(params, inputs)
        kwargs, position_ids = self.forward_arguments(replica, inputs)
        enter = self.family.enter
        hooks = hooks or {}
        vision_context = nullcontext()
        if (
            vision_cache is not None
            and self._vision_has_no_hooks(hooks)
            and vision_cache.serves(params, inputs)
        ):
            vision_context = vision_cache.use_cached_features(
                replica.get_submodule(self.family.vision_features_path or ""), inputs
            )
        with vision_context:
            captured = self._capture(replica, params, lambda module: enter(module, kwargs), hooks)
        if captured.hidden_states.shape[:2] != inputs.input_ids.shape:
            raise UnsupportedModelError(
                f"every token must be one position of the decoder; {self.card.id} made "
                f"{tuple(captured.hidden_states.shape[:2])} of {tuple(inputs.input_ids.shape)} "
                "(rows, tokens)."
            )
        if position_ids is None:
            position_ids = observed_positions(captured.position_ids, inputs)
        return captured, position_ids, inputs

    def make_vision_cache(self, params: Params, max_bytes: int) -> VisionFeatureCache | None:
        """Make a cache of image features.

        Args:
            params: The base's parameters.
            max_bytes: Largest size in bytes.

        Returns:
            The cache; None for a family without a single entry to its vision path.
        """
        if self.family.vision_features_path is None:
            return None
        inside = (f"{self.decoder}.", f"{self.card.head}.")
        names = [held for name, held in self._outer_params.items() if not name.startswith(inside)]
        return VisionFeatureCache(params, tuple(names), max_bytes)

    def _vision_has_no_hooks(self, hooks: Hooks) -> bool:
        """Whether nothing before the layers is rewritten, the token embedding aside."""
        inner_hooks = self.decoder_hooks(hooks, False)
        return all(path in inner_hooks or path == self.card.token_embedding for path in hooks)

    def _to_device(self, params: Params, inputs: Inputs) -> Inputs:
        """Inputs where the embedding is, pixels in the tower's precision: readers know neither."""
        device = params[self._placement_params[0]].device
        dtype = params[self._placement_params[-1]].dtype

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if device.type == "cuda" and value.is_cpu:  # the copy need not wait for what runs there
                value = value.pin_memory()
            target_dtype = dtype if value.is_floating_point() else None
            return value.to(device, target_dtype, non_blocking=device.type == "cuda")

        fields = ("input_ids", "attention_mask", "image_mask", "labels", "logit_positions")
        moved = {name: getattr(inputs, name).to(device) for name in fields}
        vision_inputs = {name: move(value) for name, value in inputs.vision_inputs.items()}
        return inputs._replace(**moved, vision_inputs=vision_inputs)

    def _parameter_names(self, module: nn.Module, path: str) -> list[tuple[str, str]]:
        """(name inside the part, name in `params`) of every parameter of a part."""
        part = module.get_submodule(path)
        return [
            (name, self.card.tied.get(f"{path}.{name}", f"{path}.{name}"))
            for name, _ in part.named_parameters(remove_duplicate=False)
        ]

    def decoder_hooks(self, hooks: Hooks, scored_only: bool) -> Hooks:
        """Select the hooks that act in decode: in the layers and after them.

        Args:
            hooks: Hooks by path.
            scored_only: Whether the last attention has run already.

        Returns:
            The selected hooks.

        Raises:
            UnknownSiteError: For paths that are no module.
        """
        inside = [f"{self.card.layers}.", *(f"{path}." for path in self.tail)]
        last = self.card.num_layers - 1
        saved = f"{self.card.layers}.{last}.{self.attention_paths[last]}."
        unknown = sorted(set(hooks) - self._module_paths)
        if unknown:
            raise UnknownSiteError(
                f"a rewrite's site must be a module of {self.card.id}, and it has no "
                f"{', '.join(map(repr, unknown))}; `card.resolve_site` gives full paths."
            )
        return {
            path: rewrite
            for path, rewrite in hooks.items()
            if any(f"{path}.".startswith(prefix) for prefix in inside)
            and not (scored_only and f"{path}.".startswith(saved))
        }

    def _capture(
        self,
        replica: nn.Module,
        params: Params,
        run: Callable[[nn.Module], Any],
        hooks: Hooks,
    ) -> CapturedForward:
        inner_hooks = self.decoder_hooks(hooks, False)
        outer_hooks = {path: rewrite for path, rewrite in hooks.items() if path not in inner_hooks}
        outer_params = {name: params[held] for name, held in self._outer_params.items()}
        owners = [(replica.get_submodule(path), name) for path, name in self.mutated_attributes]
        values = [getattr(part, name, None) for part, name in owners]
        try:
            with forward_hooks(replica, outer_hooks):
                return capture_forward(
                    replica,
                    list(replica.get_submodule(self.card.layers).children()),
                    replica.get_submodule(self.tail[0]),
                    self.layer_formats,
                    replica.get_submodule(self.decoder),
                    lambda: with_parameters(replica, outer_params, run),
                )
        finally:
            for (part, name), value in zip(owners, values):
                setattr(part, name, value)

    def capture_next_inputs(
        self,
        replica: nn.Module,
        params: Params,
        input_ids: Tensor,
        kv_cache: KVCache,
        hooks: Hooks | None = None,
    ) -> tuple[CapturedForward, Tensor, Tensor]:
        """Capture what the layers are called with for new tokens after cached ones.

        Args:
            replica: A copy of the module that shares its parameters.
            params: Parameters by name.
            input_ids: New token ids, [B n].
            kv_cache: Keys and values of the earlier tokens.
            hooks: Hooks on outputs of modules, by path.

        Returns:
            The captured calls, positions [B P n], and the new tokens' mask [B n].
        """
        attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        position_ids = kv_cache.next_position[:, :, None] + torch.arange(
            input_ids.shape[1], device=input_ids.device, dtype=torch.int64
        )
        hf_cache = FunctionalKVCache(self.card.num_layers, kv_cache.attention_mask.shape[1])
        captured = self._capture(
            replica,
            params,
            lambda module: module.get_submodule(self.decoder)(
                input_ids=input_ids,
                attention_mask=torch.cat([kv_cache.attention_mask, attention_mask], 1).long(),
                position_ids=hf_position_ids(position_ids),
                past_key_values=hf_cache,
                use_cache=True,
            ),
            hooks or {},
        )
        return captured, position_ids, attention_mask

    def run_layer(
        self,
        replica: nn.Module,
        params: Params,
        number: int,
        hidden_states: Tensor,
        layer_inputs: Mapping[str, Tensor],
        hf_cache: FunctionalKVCache | None,
    ) -> Tensor:
        """Run one layer, and add what the model adds after it.

        Args:
            replica: A copy of the module that shares its parameters.
            params: Parameters by name.
            number: Number of the layer.
            hidden_states: [B L D].
            layer_inputs: The layer's other inputs, rows first.
            hf_cache: Cache to pass to the layer, or None.

        Returns:
            [B L D].
        """
        templates = self.layout.templates if hf_cache is None else self.layout.cached_templates
        call = templates[number].fill(self.layout, layer_inputs, hf_cache)  # type: ignore[index]
        layer = replica.get_submodule(f"{self.card.layers}.{number}")
        args = call.args if call.hidden_as_keyword else (hidden_states, *call.args)
        kwargs = (
            {**call.kwargs, "hidden_states": hidden_states}
            if call.hidden_as_keyword
            else call.kwargs
        )
        layer_params = {local: params[held] for local, held in self._layer_params[number]}
        with ExitStack() as stack:
            if ATTENTION_OUTPUT in layer_inputs and number == self.card.num_layers - 1:
                attention = layer.get_submodule(self.attention_paths[number])
                saved = self.attention_formats[number].wrap(layer_inputs[ATTENTION_OUTPUT])
                stack.enter_context(replaced_forwards([attention], [lambda *a, **k: saved]))
            result = first_tensor(
                functional_call(layer, layer_params, args, kwargs, tie_weights=False)
            )
        added = layer_inputs.get(added_input_key(number))
        return result if added is None else result + added.to(result.device)

    @spanned("head")
    def run_head(self, replica: nn.Module, params: Params, hidden_states: Tensor) -> Tensor:
        """Run final norm, head and logit transform.

        Args:
            replica: A copy of the module that shares its parameters.
            params: Parameters by name.
            hidden_states: [B T D].

        Returns:
            [B T V].
        """
        for path, names in zip(self.tail, self._tail_params):
            part_params = {local: params[held] for local, held in names}
            part = replica.get_submodule(path)
            hidden_states = first_tensor(
                functional_call(part, part_params, (hidden_states,), tie_weights=False)
            )
        return self._logit_transform(hidden_states)

    # What is found once, on construction.

    def _probe(self, module: nn.Module) -> None:
        """Find tail, state and layouts by a free forward and two captures of a few tokens."""
        card, replica = self.card, self.replica()
        params = {name: tensor.detach() for name, tensor in module.named_parameters()}
        layers = list(replica.get_submodule(card.layers).children())
        attentions = [
            layer.get_submodule(path) if path else None
            for layer, path in zip(layers, self.attention_paths)
        ]
        inputs = synthetic_tokens(card, module, FIRST_SHAPE)
        kwargs, _ = self.forward_arguments(replica, inputs)
        trace = trace_forward(
            replica,
            layers,
            attentions,
            replica.get_submodule(card.head),
            lambda: self.family.enter(replica, kwargs),
        )
        for path, name in trace.mutated_attributes:
            setattr(replica.get_submodule(path), name, getattr(module.get_submodule(path), name))
        self.layer_formats, self.attention_formats = trace.layer_formats, trace.attention_formats
        self.tail, self.mutated_attributes = trace.tail, trace.mutated_attributes
        self._tail_params = [self._parameter_names(module, path) for path in self.tail]
        self._logit_transform = lambda logits: logits
        head_output = self.run_head(replica, params, trace.noise)
        configs = [text_config(module.config), module.config]
        self._logit_transform = find_logit_transform(
            configs, head_output, trace.logits, type(module).__name__
        )

        first, position_ids, _ = self.capture_inputs(replica, params, inputs)
        try:
            kv_cache = empty_cache(inputs.input_ids, position_ids.shape[1])
            input_ids = synthetic_tokens(card, module, SECOND_SHAPE).input_ids
            second = self.capture_next_inputs(replica, params, input_ids, kv_cache)[0]
            self.layout = infer_layout(first, FIRST_SHAPE, second, SECOND_SHAPE)
        except (UnsupportedModelError, *HF_ERRORS) as error:
            second = self.capture_inputs(
                replica, params, synthetic_tokens(card, module, LONG_SHAPE)
            )[0]
            refusal = f"its decoder does not continue from given keys and values ({error})"
            self.layout = infer_layout(first, FIRST_SHAPE, second, LONG_SHAPE, refusal)
