"""What is known about one module, and how its parts are run with other parameters.

The parts are: everything before the layers (run by the module's own forward, intercepted), each
layer, and the tail behind them. All run on the calling thread's skeleton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errata.functional import Inputs, ModelCard, Params, Past, Rewrites
from errata.functional.call import first_tensor, rewriting
from errata.functional.errors import ModelUnsupported, UnknownSite

from .capture import Capture, capture, discover, swapped
from .family import Family
from .plan import ATTENDED, added_key, make_plan
from .probe import FIRST, GROWN, LONGER, as_hugging_face, empty_past, observed, tokens
from .sight import Sight
from .skeleton import EXPLICIT, Ledger, Skeletons, replaced
from .structure import attention_path, decoder_path, text_config
from .tail import ending

__all__ = ["HUGGING_FACE", "Anatomy"]

HUGGING_FACE = (
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


class Anatomy:
    """A module's parts: where they are, what they are handed, how to run them.

    Found once by a free forward and two captures of a few tokens, in which no layer runs but one
    of each class. Raises ModelUnsupported with the reason where a cut could not be carried.
    """

    def __init__(
        self, card: ModelCard, module: Any, family: Family, attention: str = EXPLICIT
    ) -> None:
        self.card = card
        self.family = family
        self.decoder = decoder_path(module)
        self._skeletons = Skeletons(module, self.decoder, attention)
        self._sites = {path for path, _ in module.named_modules()}
        stack = module.get_submodule(card.layers)
        self.attention = tuple(attention_path(layer) for layer in stack)
        self._layer_params = [
            self._names(module, f"{card.layers}.{number}") for number in range(card.num_layers)
        ]
        inside = card.layers + "."
        self._outside = {
            name: card.ties.get(str(name), str(name))
            for name, _ in module.named_parameters(remove_duplicate=False)
            if not name.startswith(inside)
        }
        tower = [name for name in self._outside if card.vision and name.startswith(card.vision)]
        held = card.ties.get(f"{card.tokens}.weight", f"{card.tokens}.weight")
        self._first = (held, *tower[:1])  # of the embedding, of the tower
        with torch.no_grad():
            self._probe(module)

    def skeleton(self) -> nn.Module:
        """The calling thread's own tree of modules over the base's weights."""
        return self._skeletons.get()

    def arguments(self, skeleton: nn.Module, inputs: Inputs) -> tuple[dict, Tensor | None]:
        """What to enter the module's forward with, and positions [B P L] where they are ours."""
        kwargs = self.family.arguments(skeleton, inputs)
        if self.family.positions is None:
            return kwargs, None
        positions = self.family.positions(skeleton, inputs)
        return {**kwargs, "position_ids": as_hugging_face(positions)}, positions

    def before(
        self,
        skeleton: nn.Module,
        params: Params,
        inputs: Inputs,
        rewrites: Rewrites | None = None,
        sight: Sight | None = None,
    ) -> tuple[Capture, Tensor, Inputs]:
        """What the layers are handed, the positions [B P L], and the inputs where they now lie.

        With a `sight` that serves these parameters, pictures are looked up there.
        """
        inputs = self._placed(params, inputs)
        kwargs, positions = self.arguments(skeleton, inputs)
        enter = self.family.enter
        rewrites = rewrites or {}
        known = nullcontext()
        if sight is not None and self._plain_below(rewrites) and sight.serves(params, inputs):
            known = sight.looking(skeleton.get_submodule(self.family.features or ""), inputs)
        with known:
            seen = self._capture(skeleton, params, lambda module: enter(module, kwargs), rewrites)
        if seen.hidden.shape[:2] != inputs.ids.shape:
            raise ModelUnsupported(
                f"every token must be one position of the decoder; {self.card.id} made "
                f"{tuple(seen.hidden.shape[:2])} of {tuple(inputs.ids.shape)} (rows, tokens)."
            )
        if positions is None:
            positions = observed(seen.positions, inputs)
        return seen, positions, inputs

    def sight(self, params: Params, limit: int) -> Sight | None:
        """A store of picture features; None for a family whose vision path has no one door."""
        if self.family.features is None:
            return None
        inside = (f"{self.decoder}.", f"{self.card.head}.")
        names = [held for name, held in self._outside.items() if not name.startswith(inside)]
        return Sight(params, tuple(names), limit)

    def _plain_below(self, rewrites: Rewrites) -> bool:
        """Whether nothing before the layers is rewritten, the token embedding aside."""
        behind = self.within(rewrites, False)
        return all(path in behind or path == self.card.tokens for path in rewrites)

    def _placed(self, params: Params, inputs: Inputs) -> Inputs:
        """Inputs where the embedding is, pixels in the tower's precision: readers know neither."""
        device = params[self._first[0]].device
        dtype = params[self._first[-1]].dtype

        def pixel(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if device.type == "cuda" and value.is_cpu:  # the copy need not wait for what runs there
                value = value.pin_memory()
            kind = dtype if value.is_floating_point() else None
            return value.to(device, kind, non_blocking=device.type == "cuda")

        fields = ("ids", "mask", "image", "labels", "at")
        moved = {name: getattr(inputs, name).to(device) for name in fields}
        pixels = {name: pixel(value) for name, value in inputs.pixels.items()}
        return inputs._replace(**moved, pixels=pixels)

    def _names(self, module: nn.Module, path: str) -> list[tuple[str, str]]:
        """(name inside the part, name in `params`) of every parameter of a part."""
        part = module.get_submodule(path)
        return [
            (name, self.card.ties.get(f"{path}.{name}", f"{path}.{name}"))
            for name, _ in part.named_parameters(remove_duplicate=False)
        ]

    def within(self, rewrites: Rewrites, thinned: bool) -> Rewrites:
        """Rewrites that act in decode: in the layers and behind them, not in a saved attention."""
        inside = [f"{self.card.layers}.", *(f"{path}." for path in self.tail)]
        last = self.card.num_layers - 1
        saved = f"{self.card.layers}.{last}.{self.attention[last]}."
        unknown = sorted(set(rewrites) - self._sites)
        if unknown:
            raise UnknownSite(
                f"a rewrite's site must be a module of {self.card.id}, and it has no "
                f"{', '.join(map(repr, unknown))}; `card.site` gives full paths."
            )
        return {
            path: rewrite
            for path, rewrite in rewrites.items()
            if any(f"{path}.".startswith(prefix) for prefix in inside)
            and not (thinned and f"{path}.".startswith(saved))
        }

    def _capture(
        self,
        skeleton: nn.Module,
        params: Params,
        run: Callable[[nn.Module], Any],
        rewrites: Rewrites,
    ) -> Capture:
        behind = self.within(rewrites, False)
        before = {path: rewrite for path, rewrite in rewrites.items() if path not in behind}
        outside = {name: params[held] for name, held in self._outside.items()}
        state = [(skeleton.get_submodule(path), name) for path, name in self.state]
        values = [getattr(part, name, None) for part, name in state]
        try:
            with rewriting(skeleton, before):
                return capture(
                    skeleton,
                    list(skeleton.get_submodule(self.card.layers).children()),
                    skeleton.get_submodule(self.tail[0]),
                    self.shapes,
                    skeleton.get_submodule(self.decoder),
                    lambda: swapped(skeleton, outside, run),
                )
        finally:
            for (part, name), value in zip(state, values):
                setattr(part, name, value)

    def before_new(
        self,
        skeleton: nn.Module,
        params: Params,
        ids: Tensor,
        past: Past,
        rewrites: Rewrites | None = None,
    ) -> tuple[Capture, Tensor, Tensor]:
        """The same for new tokens [B n] behind a past, and their mask [B n]."""
        new = torch.ones_like(ids, dtype=torch.bool)
        positions = past.next[:, :, None] + torch.arange(ids.shape[1], device=ids.device)
        ledger = Ledger(self.card.num_layers, past.mask.shape[1])
        seen = self._capture(
            skeleton,
            params,
            lambda module: module.get_submodule(self.decoder)(
                input_ids=ids,
                attention_mask=torch.cat([past.mask, new], 1).long(),
                position_ids=as_hugging_face(positions),
                past_key_values=ledger,
                use_cache=True,
            ),
            rewrites or {},
        )
        return seen, positions, new

    def layer(
        self,
        skeleton: nn.Module,
        params: Params,
        number: int,
        hidden: Tensor,
        extras: Mapping[str, Tensor],
        ledger: Ledger | None,
    ) -> Tensor:
        """One layer, and what the model adds behind it: [B L D]."""
        templates = self.plan.plain if ledger is None else self.plan.cached
        handed = templates[number].fill(self.plan, extras, ledger)  # type: ignore[index]
        layer = skeleton.get_submodule(f"{self.card.layers}.{number}")
        args = handed.args if handed.named else (hidden, *handed.args)
        kwargs = {**handed.kwargs, "hidden_states": hidden} if handed.named else handed.kwargs
        own = {local: params[held] for local, held in self._layer_params[number]}
        with ExitStack() as stack:
            if ATTENDED in extras and number == self.card.num_layers - 1:
                site = layer.get_submodule(self.attention[number])
                saved = self.attention_shapes[number].of(extras[ATTENDED])
                stack.enter_context(replaced([site], [lambda *a, **k: saved]))
            result = first_tensor(functional_call(layer, own, args, kwargs, tie_weights=False))
        added = extras.get(added_key(number))
        return result if added is None else result + added.to(result.device)

    def finish(self, skeleton: nn.Module, params: Params, hidden: Tensor) -> Tensor:
        """Final norm, head and what the model does to its logits: [B T V]."""
        for path, names in zip(self.tail, self._tail_params):
            own = {local: params[held] for local, held in names}
            part = skeleton.get_submodule(path)
            hidden = first_tensor(functional_call(part, own, (hidden,), tie_weights=False))
        return self._ending(hidden)

    # What is found once, on construction.

    def _probe(self, module: nn.Module) -> None:
        """Find tail, state and layouts by a free forward and two captures of a few tokens."""
        card, skeleton = self.card, self.skeleton()
        params = {name: tensor.detach() for name, tensor in module.named_parameters()}
        layers = list(skeleton.get_submodule(card.layers).children())
        attentions = [
            layer.get_submodule(path) if path else None
            for layer, path in zip(layers, self.attention)
        ]
        inputs = tokens(card, module, FIRST)
        kwargs, _ = self.arguments(skeleton, inputs)
        found = discover(
            skeleton,
            layers,
            attentions,
            skeleton.get_submodule(card.head),
            lambda: self.family.enter(skeleton, kwargs),
        )
        for path, name in found.state:
            setattr(skeleton.get_submodule(path), name, getattr(module.get_submodule(path), name))
        self.shapes, self.attention_shapes = found.layers, found.attention
        self.tail, self.state = found.tail, found.state
        self._tail_params = [self._names(module, path) for path in self.tail]
        self._ending = lambda logits: logits
        raw = self.finish(skeleton, params, found.noise)
        configs = [text_config(module.config), module.config]
        self._ending = ending(configs, raw, found.logits, type(module).__name__)

        one, positions, _ = self.before(skeleton, params, inputs)
        try:
            past = empty_past(inputs.ids, positions.shape[1])
            ids = tokens(card, module, GROWN).ids
            two = self.before_new(skeleton, params, ids, past)[0]
            self.plan = make_plan(one, FIRST, two, GROWN)
        except (ModelUnsupported, *HUGGING_FACE) as error:
            two = self.before(skeleton, params, tokens(card, module, LONGER))[0]
            refusal = f"its decoder does not go on from keys and values it is given ({error})"
            self.plan = make_plan(one, FIRST, two, LONGER, refusal)
