"""One implementation of embed, decode, thin and extend for every Hugging Face decoder.

embed runs the module's own forward with the decoder's layers intercepted: nothing of them runs,
but what they are handed is recorded. decode then calls the layers itself, with the parameters it
is given. No family has code here: what differs is data (`family.py`) and what the probe finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errata.functional import (
    IGNORE,
    Batch,
    Inputs,
    Model,
    ModelCard,
    Params,
    Past,
    Query,
    Rewrites,
)
from errata.functional.call import first_tensor, rewriting
from errata.functional.errors import ModelUnsupported, ShapeMismatch, UnknownSite
from errata.functional.rows import pick

from .attributes import check_config
from .capture import Capture, capture, discover, stopped_at, swapped
from .families import family_of
from .family import Family
from .generic import Proof, proven, samples
from .plan import ATTENDED, added_key, make_plan
from .probe import (
    FIRST,
    GROWN,
    LONGER,
    as_hugging_face,
    empty_past,
    observed,
    tokens,
)
from .skeleton import EXPLICIT, Ledger, Skeletons, replaced
from .structure import attention_path, decoder_path, text_config
from .tail import ending

__all__ = ["Decoder", "build"]


def build(
    card: ModelCard,
    module: nn.Module,
    read: Callable[[Sequence[Query]], Inputs],
    write: Callable[[Sequence[int]], str],
    family: Family | None = None,
    given: Sequence[Inputs] = (),
) -> Model:
    """A Hugging Face module as pure functions of its parameters.

    The module is never written to, and its parameters are shared, not copied. What its layers are
    handed is found by two probes of a few tokens, in which no layer runs but one of each class.
    A family found by structure is then proven on real input: `given`, or what `samples` makes.
    Raises ModelUnsupported with the reason where the module does something a cut can not carry.
    """
    family = family or family_of(card.family)
    if family.explicit:
        check_config(module.config, family)
        decoder = Decoder(card, module, family)
    else:
        decoder = proven(
            module,
            decoder_path(module),
            given or samples(card, module, read),
            lambda attention: Decoder(card, module, family, attention),
        )
    return Model(
        card=card,
        params={name: tensor.detach() for name, tensor in module.named_parameters()},
        read=read,
        embed=decoder.embed,
        decode=decoder.decode,
        thin=decoder.thin,
        extend=decoder.extend,
        write=write,
    )


class Decoder:
    """What is known about one module; its methods are the functions of a `Model`.

    Nothing in it changes after construction but the per-thread skeletons.
    """

    def __init__(
        self, card: ModelCard, module: nn.Module, family: Family, attention: str = EXPLICIT
    ) -> None:
        self.card = card
        self.family = family
        self.attention_name = attention
        self.config = module.config
        self.unthinnable = ""  # why the last layer can not run on scored positions only
        self.proofs: tuple[Proof, ...] = ()
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
            name: card.ties.get(name, name)
            for name, _ in module.named_parameters(remove_duplicate=False)
            if not name.startswith(inside)
        }
        with torch.no_grad():
            self._probe(module)

    # The four functions of a model.

    def embed(
        self,
        params: Params,
        inputs: Inputs,
        rewrites: Rewrites | None = None,
        edit: Tensor | None = None,
    ) -> Batch:
        """Vision tower, projector and token embeddings: the batch at depth 0."""
        seen, positions = self._embed(self._skeletons.get(), params, inputs, rewrites)
        return Batch(
            hidden=seen.hidden,
            mask=inputs.mask,
            positions=positions,
            image=inputs.image,
            labels=inputs.labels,
            at=inputs.at,
            edit=torch.zeros_like(inputs.ids[:, 0]) if edit is None else edit,
            extras=self.plan.pack(seen),
        )

    def decode(
        self,
        params: Params,
        batch: Batch,
        rewrites: Rewrites | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
        at: Tensor | str | None = None,
        past: Past | None = None,
        keep: bool = False,
    ) -> Any:
        """Layers `batch.depth` up to `stop`; see `Model`. `at="all"` gives every position's logits.

        `past` holds the layers that are run, or all of the model's. Raises ShapeMismatch where
        `start` is not the batch's depth or `past` holds other layers.
        """
        card = self.card
        stop = card.num_layers if stop is None else stop
        if start not in (None, batch.depth) or not batch.depth <= stop <= card.num_layers:
            raise ShapeMismatch(
                f"decode goes on from the batch's depth {batch.depth} to at most layer "
                f"{card.num_layers}; asked for start={start}, stop={stop}."
            )
        thinned = ATTENDED in batch.extras
        skeleton = self._skeletons.get()
        ledger = self._ledger(past, batch, stop) if past is not None or keep else None
        hidden = batch.hidden
        with rewriting(skeleton, self._within(rewrites or {}, thinned)):
            for number in range(batch.depth, stop):
                if ledger is not None and past is not None:
                    ledger.past = _of_layer(past, number, batch.depth, card.num_layers)
                hidden = self._layer(skeleton, params, number, hidden, batch.extras, ledger)
            if stop < card.num_layers:
                result = batch._replace(hidden=hidden, depth=stop)
            else:
                if not isinstance(at, str):
                    hidden = _gather(hidden, batch.at if at is None else at)
                result = self._finish(skeleton, params, hidden)
        return (result, _kept(ledger, batch, past)) if keep and ledger is not None else result

    def thin(
        self,
        params: Params,
        batch: Batch,
        rewrites: Rewrites | None = None,
        *,
        past: Past | None = None,
    ) -> Batch:
        """Run the last layer's attention on whole rows, keep the scored positions; see `Model`.

        Raises ShapeMismatch for a batch that is not before the last layer.
        """
        last = self.card.num_layers - 1
        if batch.depth != last or ATTENDED in batch.extras:
            raise ShapeMismatch(
                f"thin takes a whole batch before the last layer, at depth {last}; got one at "
                f"depth {batch.depth}: decode(params, batch, stop={last}) first."
            )
        if not self.attention[last]:
            self.no_thin("its last layer has no one self-attention")
        if self.unthinnable:
            raise ModelUnsupported(f"{self.card.id} can not be thinned: {self.unthinnable}.")
        skeleton = self._skeletons.get()
        ledger = None if past is None else self._ledger(past, batch, last + 1)
        if ledger is not None and past is not None:
            ledger.past = _of_layer(past, last, last, self.card.num_layers)
        site = f"{self.card.layers}.{last}.{self.attention[last]}"
        inside = {
            path: rewrite
            for path, rewrite in self._within(rewrites or {}, False).items()
            if path.startswith(f"{self.card.layers}.{last}.")
        }
        with rewriting(skeleton, inside):
            attended = stopped_at(
                skeleton.get_submodule(site),
                lambda: self._layer(skeleton, params, last, batch.hidden, batch.extras, ledger),
            )
        few = pick(batch, batch.at)
        at = torch.arange(batch.at.shape[1], device=batch.at.device).expand_as(batch.at)
        return few._replace(at=at, extras={**few.extras, ATTENDED: _gather(attended, batch.at)})

    def extend(
        self,
        params: Params,
        ids: Tensor,
        past: Past,
        rewrites: Rewrites | None = None,
        edit: Tensor | None = None,
    ) -> Batch:
        """The batch at depth 0 of new token ids [B n] behind `past`; `at` is the last of them."""
        if self.plan.cached is None:
            raise ModelUnsupported(
                f"{self.card.id} can not go on from keys and values: {self.plan.refusal}."
            )
        skeleton = self._skeletons.get()
        seen, positions, new = self._extend(skeleton, params, ids, past, rewrites)
        last = torch.full_like(ids[:, :1], ids.shape[1] - 1)
        return Batch(
            hidden=seen.hidden,
            mask=new,
            positions=positions,
            image=torch.zeros_like(new),
            labels=torch.full_like(last, IGNORE),
            at=last,
            edit=torch.zeros_like(ids[:, 0]) if edit is None else edit,
            extras=self.plan.pack(seen),
        )

    def no_thin(self, reason: str) -> None:
        """Refuse `thin` from now on."""
        self.unthinnable = reason

    def no_past(self, reason: str) -> None:
        """Refuse to keep and to go on from keys and values from now on."""
        self.plan = self.plan._replace(cached=None, refusal=reason)

    # What they share.

    def _arguments(self, skeleton: nn.Module, inputs: Inputs) -> tuple[dict, Tensor | None]:
        kwargs = self.family.arguments(skeleton, inputs)
        if self.family.positions is None:
            return kwargs, None
        positions = self.family.positions(skeleton, inputs)
        return {**kwargs, "position_ids": as_hugging_face(positions)}, positions

    def _embed(
        self,
        skeleton: nn.Module,
        params: Params,
        inputs: Inputs,
        rewrites: Rewrites | None = None,
    ) -> tuple[Capture, Tensor]:
        kwargs, positions = self._arguments(skeleton, inputs)
        enter = self.family.enter
        seen = self._capture(skeleton, params, lambda module: enter(module, kwargs), rewrites or {})
        if seen.hidden.shape[:2] != inputs.ids.shape:
            raise ModelUnsupported(
                f"every token must be one position of the decoder; {self.card.id} made "
                f"{tuple(seen.hidden.shape[:2])} of {tuple(inputs.ids.shape)} (rows, tokens)."
            )
        return seen, observed(seen.positions, inputs) if positions is None else positions

    def _names(self, module: nn.Module, path: str) -> list[tuple[str, str]]:
        """(name inside the part, name in `params`) of every parameter of a part."""
        part = module.get_submodule(path)
        return [
            (name, self.card.ties.get(f"{path}.{name}", f"{path}.{name}"))
            for name, _ in part.named_parameters(remove_duplicate=False)
        ]

    def _within(self, rewrites: Rewrites, thinned: bool) -> Rewrites:
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
        behind = self._within(rewrites, False)
        before = {path: rewrite for path, rewrite in rewrites.items() if path not in behind}
        outside = {name: params[held] for name, held in self._outside.items()}
        state = [(skeleton.get_submodule(path), name) for path, name in self.state]
        values = [getattr(part, name, None) for part, name in state]
        try:
            with rewriting(skeleton, before):
                return capture(
                    skeleton,
                    list(skeleton.get_submodule(self.card.layers)),
                    skeleton.get_submodule(self.tail[0]),
                    self.shapes,
                    skeleton.get_submodule(self.decoder),
                    lambda: swapped(skeleton, outside, run),
                )
        finally:
            for (part, name), value in zip(state, values):
                setattr(part, name, value)

    def _extend(
        self,
        skeleton: nn.Module,
        params: Params,
        ids: Tensor,
        past: Past,
        rewrites: Rewrites | None = None,
    ) -> tuple[Capture, Tensor, Tensor]:
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

    def _ledger(self, past: Past | None, batch: Batch, stop: int) -> Ledger:
        if self.plan.cached is None:
            raise ModelUnsupported(f"{self.card.id} keeps no keys and values: {self.plan.refusal}.")
        if ATTENDED in batch.extras:
            raise ShapeMismatch("a thinned batch has no keys and values to keep or to go on from.")
        if past is None:
            return Ledger(self.card.num_layers)
        needed = {stop - batch.depth, self.card.num_layers - batch.depth, self.card.num_layers}
        if len(past.keys) not in needed:
            raise ShapeMismatch(
                f"a past must hold the layers {batch.depth} to {stop} that are run, or all "
                f"{self.card.num_layers}; it holds {len(past.keys)}."
            )
        return Ledger(self.card.num_layers, past.mask.shape[1])

    def _layer(
        self,
        skeleton: nn.Module,
        params: Params,
        number: int,
        hidden: Tensor,
        extras: Mapping[str, Tensor],
        ledger: Ledger | None,
    ) -> Tensor:
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
        return result if added is None else result + added

    def _finish(self, skeleton: nn.Module, params: Params, hidden: Tensor) -> Tensor:
        for path, names in zip(self.tail, self._tail_params):
            own = {local: params[held] for local, held in names}
            part = skeleton.get_submodule(path)
            hidden = first_tensor(functional_call(part, own, (hidden,), tie_weights=False))
        return self._ending(hidden)

    # What is found once, on construction.

    def _probe(self, module: nn.Module) -> None:
        """Find tail, state and layouts by a free forward and two captures of a few tokens."""
        card, skeleton = self.card, self._skeletons.get()
        params = {name: tensor.detach() for name, tensor in module.named_parameters()}
        layers = list(skeleton.get_submodule(card.layers))
        attentions = [
            layer.get_submodule(path) if path else None
            for layer, path in zip(layers, self.attention)
        ]
        inputs = tokens(card, module, FIRST)
        kwargs, _ = self._arguments(skeleton, inputs)
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
        raw = self._finish(skeleton, params, found.noise)
        configs = [text_config(module.config), module.config]
        self._ending = ending(configs, raw, found.logits, type(module).__name__)

        one, positions = self._embed(skeleton, params, inputs)
        try:
            past = empty_past(inputs.ids, positions.shape[1])
            ids = tokens(card, module, GROWN).ids
            two = self._extend(skeleton, params, ids, past)[0]
            self.plan = make_plan(one, FIRST, two, GROWN)
        except (
            AttributeError,
            IndexError,
            KeyError,
            ModelUnsupported,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            two, _ = self._embed(skeleton, params, tokens(card, module, LONGER))
            refusal = f"its decoder does not go on from keys and values it is given ({error})"
            self.plan = make_plan(one, FIRST, two, LONGER, refusal)


def _gather(hidden: Tensor, at: Tensor) -> Tensor:
    index = at[..., None].expand(*at.shape, hidden.shape[-1])
    return hidden.gather(1, index)


def _of_layer(past: Past, number: int, depth: int, num_layers: int) -> tuple[Tensor, Tensor]:
    index = number if len(past.keys) == num_layers else number - depth
    return past.keys[index], past.values[index]


def _kept(ledger: Ledger, batch: Batch, past: Past | None) -> Past:
    """Keys and values of a decode and what came before it; `next` is one past the last position."""
    last = batch.positions.masked_fill(~batch.mask[:, None], -1).amax((1, 2))[:, None] + 1
    following = last.expand(-1, batch.positions.shape[1])
    if past is not None:
        following = torch.maximum(following, past.next)
    mask = batch.mask if past is None else torch.cat([past.mask, batch.mask], 1)
    return Past(
        tuple(keys for keys, _ in ledger.joined),
        tuple(values for _, values in ledger.joined),
        mask,
        following,
    )
