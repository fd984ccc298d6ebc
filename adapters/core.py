"""One implementation of embed, decode, thin and extend for every Hugging Face decoder.

embed runs the module's own forward with the decoder's layers intercepted: nothing of them runs,
but what they are handed is recorded. decode then calls the layers itself, with the parameters it
is given. No family has code here: what differs is data (`family.py`) and what the probe finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

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
from errata.functional.call import rewriting
from errata.functional.errors import ModelUnsupported, ShapeMismatch
from errata.functional.rows import ends, pick

from .anatomy import Anatomy
from .attributes import check_config
from .capture import stopped_at
from .families import family_of
from .family import Family
from .generic import Proof, proven, samples
from .plan import ATTENDED
from .sight import Sight
from .skeleton import EXPLICIT, Ledger
from .structure import decoder_path

__all__ = ["Decoder", "build", "seeing_once"]


def build(
    card: ModelCard,
    module: Any,
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
        card=decoder.card,
        params={name: tensor.detach() for name, tensor in module.named_parameters()},
        read=read,
        embed=decoder.embed,
        decode=decoder.decode,
        thin=decoder.thin,
        extend=decoder.extend,
        write=write,
    )


def seeing_once(model: Model, limit: int = 256 << 20) -> Model:
    """The model, with each picture's features computed once and kept, up to `limit` bytes.

    Each picture is looked at alone, whoever shares its batch: features equal those of a batch up to
    rounding, and are the same in any batch. Edits of the vision path and rewrites in it are not
    served by what is kept. A family without `features` comes back as it is.

    >>> from errata import adapters
    >>> model = seeing_once(adapters.adapt(*adapters.tiny("llava")))
    """
    decoder = getattr(model.embed, "__self__", None)
    sight = decoder.body.sight(model.params, limit) if isinstance(decoder, Decoder) else None
    return model if sight is None else model._replace(embed=partial(model.embed, sight=sight))


class Decoder:
    """The functions of a `Model`, over what is known about one module.

    Nothing in it changes once it is built (and, on the generic path, proven) but the skeletons,
    of which each thread has its own.
    """

    def __init__(
        self, card: ModelCard, module: Any, family: Family, attention: str = EXPLICIT
    ) -> None:
        self.body = Anatomy(card, module, family, attention)
        self.attention_name = attention
        self.config = module.config
        self.unthinnable = ""  # why the last layer can not run on scored positions only
        self.proofs: tuple[Proof, ...] = ()
        first = self.body.tail[0]
        normed = "norm" in type(module.get_submodule(first)).__name__.lower()
        self.card = replace(card, norm=first) if normed and not card.norm else card

    # The four functions of a model.

    def embed(
        self,
        params: Params,
        inputs: Inputs,
        rewrites: Rewrites | None = None,
        edit: Tensor | None = None,
        *,
        sight: Sight | None = None,
    ) -> Batch:
        """Vision tower, projector and token embeddings: the batch at depth 0."""
        skeleton = self.body.skeleton()
        seen, positions, inputs = self.body.before(skeleton, params, inputs, rewrites, sight)
        return Batch(
            hidden=seen.hidden,
            mask=inputs.mask,
            positions=positions,
            image=inputs.image,
            prompt=ends(inputs),
            labels=inputs.labels,
            at=inputs.at,
            edit=torch.zeros_like(inputs.ids[:, 0]) if edit is None else edit,
            extras=self.body.plan.pack(seen),
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
        skeleton = self.body.skeleton()
        ledger = self._ledger(past, batch, stop) if past is not None or keep else None
        hidden = batch.hidden
        with rewriting(skeleton, self.body.within(rewrites or {}, thinned)):
            for number in range(batch.depth, stop):
                if ledger is not None and past is not None:
                    ledger.past = _of_layer(past, number, batch.depth, card.num_layers)
                hidden = self.body.layer(skeleton, params, number, hidden, batch.extras, ledger)
            if stop < card.num_layers:
                result = batch._replace(hidden=hidden, depth=stop)
            else:
                if not isinstance(at, str):
                    hidden = _gather(hidden, batch.at if at is None else at)
                result = self.body.finish(skeleton, params, hidden)
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

        A model whose last layer can not run that way (`unthinnable` says why) gives the batch as
        it is. Raises ShapeMismatch for a batch that is not before the last layer.
        """
        last = self.card.num_layers - 1
        if batch.depth != last or ATTENDED in batch.extras:
            raise ShapeMismatch(
                f"thin takes a whole batch before the last layer, at depth {last}; got one at "
                f"depth {batch.depth}: decode(params, batch, stop={last}) first."
            )
        if not self.body.attention[last]:
            self.no_thin("its last layer has no one self-attention")
        if self.unthinnable:
            return batch  # more positions than needed, and the same logits
        skeleton = self.body.skeleton()
        ledger = None if past is None else self._ledger(past, batch, last + 1)
        if ledger is not None and past is not None:
            ledger.past = _of_layer(past, last, last, self.card.num_layers)
        site = f"{self.card.layers}.{last}.{self.body.attention[last]}"
        inside = {
            path: rewrite
            for path, rewrite in self.body.within(rewrites or {}, False).items()
            if path.startswith(f"{self.card.layers}.{last}.")
        }
        with rewriting(skeleton, inside):
            attended = stopped_at(
                skeleton.get_submodule(site),
                lambda: self.body.layer(skeleton, params, last, batch.hidden, batch.extras, ledger),
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
        if self.body.plan.cached is None:
            raise ModelUnsupported(
                f"{self.card.id} can not go on from keys and values: {self.body.plan.refusal}."
            )
        skeleton = self.body.skeleton()
        seen, positions, new = self.body.before_new(skeleton, params, ids, past, rewrites)
        last = torch.full_like(ids[:, :1], ids.shape[1] - 1)
        return Batch(
            hidden=seen.hidden,
            mask=new,
            positions=positions,
            image=torch.zeros_like(new),
            prompt=torch.zeros_like(new),
            labels=torch.full_like(last, IGNORE),
            at=last,
            edit=torch.zeros_like(ids[:, 0]) if edit is None else edit,
            extras=self.body.plan.pack(seen),
            notes=past.notes,
        )

    def no_thin(self, reason: str) -> None:
        """Leave batches whole in `thin` from now on."""
        self.unthinnable = reason

    def no_past(self, reason: str) -> None:
        """Refuse to keep and to go on from keys and values from now on."""
        self.body.plan = self.body.plan._replace(cached=None, refusal=reason)

    def _ledger(self, past: Past | None, batch: Batch, stop: int) -> Ledger:
        if self.body.plan.cached is None:
            raise ModelUnsupported(
                f"{self.card.id} keeps no keys and values: {self.body.plan.refusal}."
            )
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
        batch.notes,
    )
