"""A `scope` entry bound to a model: each question is judged once, then answered by base or edit.

    s = max_n exp(-|e(n) - e(question)|^2),   n the most similar edit in memory
    hard   log p = log c(. | n) if s > threshold, else log f       (f: bit for bit the base)
    soft   log p = log( (1 - s) softmax f + s softmax c )

f are the base's logits; c are read by the base's own final norm and head from what the small
network makes of edit n and the question. Both act from the prompt's last token on: what is said
token by token is what one pass gives. The judgement is made of the prompt alone and kept in
`batch.notes`, with the question in the network's width, for the tokens that follow.

After SERAC: Mitchell et al. 2022, https://arxiv.org/abs/2206.06520; EasyEdit's `SERAC_MULTI`, whose
classifier reads the answer that is being scored and no picture, and whose counterfactual model sees
pictures through a random matrix. Legend: B rows · L tokens · T positions · D, d widths · N slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.kernels import codebook as kernel

from .change import Change
from .entries import Scope
from .errors import BadInput, ShapeMismatch
from .header import Header
from .scope_net import Memory, Net, Row, answered, classify, net_of, row_of, say
from .types import IGNORE, Batch, Model, Params, Past, Rewrites

__all__ = ["mixed", "read_as", "scope"]


class _Parts(NamedTuple):
    """An entry's tensors, ready to be asked."""

    entry: Scope
    number: int  # of deltas below
    net: Net
    keys: Tensor  # [N K], or [E N K] of a stacked delta
    norms: Tensor | None
    memory: Memory
    answers: Tensor
    stacked: bool

    def name(self, what: str) -> str:
        """The name of a note or an extra of this entry's own.

        Deltas lie one on another, and rows side by side run under deltas of other sizes.
        """
        sizes = f"{self.entry.sizes.width}.{self.entry.replies}"
        return f"{self.entry.name}.scope.{self.number}.{sizes}.{what}"

    def of(self, tensor: Tensor, index: Tensor, edit: Tensor) -> Tensor:
        """Each row's slot of a tensor that has one per edit in memory."""
        return tensor[edit.clamp_min(0), index] if self.stacked else tensor[index]


def scope(model: Model, header: Header, entry: Scope, tensors: Mapping[str, Tensor]) -> Change:
    """What a scope classifier, a counterfactual model and their memory do to a model.

    Raises ShapeMismatch where the network is for a model of another width.
    """
    if entry.sizes.model != model.card.width:
        raise ShapeMismatch(
            f"{entry.name}: the network must read rows as wide as the model's, {model.card.width}; "
            f"its own are {entry.sizes.model}."
        )
    given = {name.removeprefix(f"{entry.name}."): t.float() for name, t in tensors.items()}
    stacked = bool(header.stack)
    parts = _Parts(
        entry,
        len(model.deltas),
        net_of(given),
        given["keys"],
        None if stacked else kernel.square_norms(given["keys"]),
        Memory(given["replies"], given["scenes"], given["prompts"]),
        given["answers"],
        stacked,
    )
    return Change(wrap=partial(_wrapped, parts))


def read_as(
    model: Model, params: Params, hidden: Tensor, edit: Tensor, rewrites: Rewrites | None = None
) -> Tensor:
    """The logits [B T V] of residual streams [B T D] behind the last layer: final norm and head.

    `edit` [B] says which edit of a stacked delta, bound before, each row runs under.
    """
    there = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    batch = Batch(
        hidden=hidden,
        mask=torch.ones_like(there, dtype=torch.bool),
        positions=there[:, None],
        image=torch.zeros_like(there, dtype=torch.bool),
        prompt=torch.zeros_like(there, dtype=torch.bool),
        labels=torch.full_like(there, IGNORE),
        at=there,
        edit=edit,
        extras={},
        depth=model.card.num_layers,
    )
    return model.decode(params, batch, rewrites or {})


def mixed(base: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """log( (1 - s) softmax f + s softmax c ) [B T V], for shares s [B T]; f itself where s is 0.

    Without the peers' + eps: both terms stay logarithms.

    >>> f, c = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    >>> mixed(f, c, torch.tensor([[0.5]])).exp()
    tensor([[[0.5000, 0.5000]]])
    """
    tiny = torch.finfo(torch.float32).eps
    s = share.float().clamp(tiny, 1 - tiny)[..., None]
    f, c = base.float().log_softmax(-1), other.float().log_softmax(-1)
    both = torch.logaddexp(torch.log1p(-s) + f, s.log() + c)
    return torch.where(share[..., None] > 0, both, base.float())


def _wrapped(parts: _Parts, model: Model) -> Model:
    said, gate, index = parts.name("said@bq_"), parts.name("gate@bq"), parts.name("slot@b")
    last = model.card.num_layers

    def known(batch: Batch, what: str) -> None:
        if 0 < batch.depth < last and said not in batch.extras:
            raise BadInput(
                "a delta of kind 'scope' judges a question by the rows it is asked in: hand the "
                f"bound model batches at depth 0, or cut by itself; {what} got one at depth "
                f"{batch.depth} that it has not seen."
            )

    def decode(
        params: Params,
        batch: Batch,
        rewrites: Rewrites | None = None,
        *,
        stop: int | None = None,
        at: Tensor | str | None = None,
        past: Past | None = None,
        keep: bool = False,
        **options: Any,
    ) -> Any:
        known(batch, "decode")
        if batch.depth == 0 and said not in batch.extras:
            batch = _judged(parts, batch, past)
        found = model.decode(
            params, batch, rewrites or {}, stop=stop, at=at, past=past, keep=keep, **options
        )
        if stop not in (None, last) or batch.depth == last:
            return found
        logits, kept = found if keep else (found, None)
        where = batch.at if at is None else at
        share, states = batch.extras[gate], batch.extras[said]
        if isinstance(where, Tensor):
            share = share.gather(1, where)
            states = states.gather(1, where[..., None].expand(-1, -1, states.shape[-1]))
        h, pointer = states.split([parts.entry.sizes.width, parts.entry.replies], -1)
        answers = parts.of(parts.answers, batch.extras[index], batch.edit)  # [B A D]
        stream = answered(parts.net, h, pointer, answers).to(batch.hidden.dtype)
        other = read_as(model, params, stream, batch.edit, rewrites)
        if parts.entry.gate == "soft":
            logits = mixed(logits, other, share).to(logits.dtype)
        else:
            logits = torch.where(share[..., None] > parts.entry.threshold, other, logits)
        return (logits, kept) if keep else logits

    def thin(params: Params, batch: Batch, rewrites: Rewrites | None = None, **options) -> Batch:
        known(batch, "thin")
        return model.thin(params, batch, rewrites or {}, **options)

    def extend(
        params: Params, ids: Tensor, past: Past, rewrites: Rewrites | None = None,
        edit: Tensor | None = None,
    ) -> Batch:  # fmt: skip
        batch = model.extend(params, ids, past, rewrites or {}, edit=edit)
        # New tokens lie behind the prompt: what was judged there holds.
        later = {parts.name("later"): batch.edit}
        return batch._replace(notes={**batch.notes, **later})

    return model._replace(decode=decode, thin=thin, extend=extend)


def _judged(parts: _Parts, batch: Batch, past: Past | None) -> Batch:
    """The batch with what its rows' questions are about, and what the edit says to them."""
    heads, length = parts.entry.sizes.heads, batch.hidden.shape[1]
    notes = {**(past.notes if past else {}), **batch.notes}
    new = row_of(parts.net, batch)
    names = [parts.name(field) for field in Row._fields]
    whole = Row(*(torch.cat([notes[n], x], 1) if n in notes else x for n, x in zip(names, new)))
    if parts.name("later") in batch.notes:
        share, index = notes[parts.name("share")], notes[parts.name("slot")]
    else:
        share, index = _found(parts, classify(parts.net, heads, whole), batch.edit)
    memory = Memory(*(parts.of(part, index, batch.edit) for part in parts.memory))
    states, pointer = say(parts.net, heads, whole, memory)
    acts = whole.prompt.cumsum(1)[:, -length:] > 0  # [B L]
    mine = {
        parts.name("said@bq_"): torch.cat([states, pointer], -1)[:, -length:],
        parts.name("gate@bq"): share[:, None] * acts,
        parts.name("slot@b"): index,
    }
    kept = dict(zip(names, whole)) | {parts.name("share"): share, parts.name("slot"): index}
    others = {name: note for name, note in notes.items() if name != parts.name("later")}
    return batch._replace(extras={**batch.extras, **mine}, notes={**others, **kept})


def _found(parts: _Parts, key: Tensor, edit: Tensor) -> tuple[Tensor, Tensor]:
    """s [B] and the most similar edit's slot [B], the lowest on ties."""
    if parts.stacked:
        gaps = (parts.keys[edit.clamp_min(0)] - key[:, None]).square().sum(-1)  # [B N]
        least, index = gaps.min(1)
        return torch.where(edit >= 0, torch.exp(-least), 0), index
    near = kernel.nearest(key.detach(), parts.keys, norms=parts.norms)
    share = torch.where(near.index >= 0, torch.exp(-near.distance.square()), 0)
    return share, near.index.clamp_min(0)
