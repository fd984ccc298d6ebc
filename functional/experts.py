"""LiveEdit's experts at a decoder layer's output: features of a row, the gate, the residual.

With h what the layer gives a row, V its picture's tokens and Q its prompt's behind the picture
(never the answer's), f = vision features of V as asked by Q, g = query features of Q, and f' =
those of the sentinel picture as asked by Q:

    S   = { m : <f, E_m> > <f, f'> }                                  the hard gate
    w_m = softmax_S(s)_m * sigmoid(s_m),    s_m = scale * <g, G_m>    the soft one
    h'  = h + sum_{m in S} w_m relu(LN(h) A_m^T) B_m                  at every token

Features are cross-attentions from S_q learned slots: slots look at Q, what they found looks at V. A
row decides once, at its prompt; later tokens take the decision from `batch.notes`.

Rows without a picture take their prompt in place of V, and have a sentinel of their own. The last
two columns of the keys say what an expert is for: (1, 0) pictures, (0, 1) text, (1, 1) nothing; a
row's features hold -1e30 in the other kind's column, so no expert of that kind comes near.

Because attention has few queries here, keys are never formed: q . (W_k x) = (W_k^T q) . x, and
sum p (W_v x) = W_v (sum p x): 2 L d rows instead of 2 L d k multiplications each. The bias of W_k
moves all scores of a softmax alike and is no part of this.

Source: LiveEdit (arXiv 2411.15432), qizhou000/LiveEdit `editor/vllm_editors/liveedit/`. Different:
answer tokens never enter the gate (there, unless the caller says how long the answer is, they do);
rows without a picture can be edited (there, never); a pool may hold deleted experts.

Legend: B rows · L tokens · D width of the decoder · M experts · S slots · K width of a slot ·
H heads · R rank · E edits of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.kernels import lora_moe
from errata.kernels.lora_moe import Routes

from .change import Change
from .errors import UnknownSite
from .header import Experts, Header
from .places import canonical
from .types import Batch, Model, Rewrites

__all__ = [
    "EPS", "FAR", "Features", "Reader", "Tokens", "attend", "cleared", "experts", "features",
    "reader_of", "scale_of", "tokens_of",
]  # fmt: skip

EPS = 1e-5  # of every layer norm here
FAR = 1e30


class Reader(NamedTuple):
    """What reads a row's features; constant queries are absorbed into `rows`."""

    asked_norm: Tensor  # [2 D] weight and bias
    asked_rows: Tensor  # [SH D]
    asked_value: Tensor  # [K D]
    asked_bias: Tensor  # [K]
    seen_query: Tensor  # [K K]
    seen_shift: Tensor  # [K]
    seen_key: Tensor  # [K D]
    seen_value: Tensor  # [K D]
    seen_bias: Tensor  # [K]
    query_norm: Tensor  # [2 D]
    query_rows: Tensor  # [SH D]
    query_value: Tensor  # [K D]
    query_bias: Tensor  # [K]


class Tokens(NamedTuple):
    """Which tokens of a row are what; a row without a picture sees its prompt."""

    seen: Tensor  # [B L] bool
    asked: Tensor  # [B L] bool
    answer: Tensor  # [B L] bool, behind the prompt's last
    pictured: Tensor  # [B] bool


class Features(NamedTuple):
    """What a row is routed by."""

    vision: Tensor  # [B SK]
    query: Tensor  # [B SK]
    sentinel: Tensor  # [B SK] of the sentinel, as this row asks
    pictured: Tensor  # [B] bool


def scale_of(slots: int, width: int) -> float:
    """1 / (S sqrt(K)): the mean over slots of scaled products."""
    return 1 / (slots * math.sqrt(width))


def tokens_of(batch: Batch) -> Tokens:
    """Picture, prompt and answer of each row.

    The prompt counts from behind the first token of the picture on, unless nothing stands there.
    """
    upto = batch.prompt.int().flip(1).cumsum(1).flip(1) > 0  # [B L], with the prompt's last
    image = batch.image & upto & batch.mask
    words = upto & batch.mask & ~batch.image
    behind = words & (image.int().cumsum(1) > 0)
    pictured = image.any(1)
    asked = torch.where(behind.any(1, keepdim=True), behind, words)
    return Tokens(
        seen=torch.where(pictured[:, None], image, asked),
        asked=asked,
        answer=batch.mask & ~upto & batch.prompt.any(1, keepdim=True),
        pictured=pictured,
    )


def attend(
    rows: Tensor, x: Tensor, keep: Tensor, value: Tensor, bias: Tensor, heads: int
) -> Tensor:
    """Cross-attention with absorbed queries: rows [SH D] or [B SH D], x [B L D] -> [B S K].

    p = softmax over kept tokens of x . row;  out_h = W_v,h (sum p x) + b_v,h;  0 without tokens.
    """
    scores = x @ rows.mT  # [B L SH]
    scores = torch.where(keep[..., None], scores, -torch.inf)
    some = keep.any(1)[:, None, None]  # [B 1 1]
    shares = torch.where(some, scores, 0).softmax(1)  # [B L SH]
    found = (shares.mT @ x).unflatten(1, (-1, heads))  # [B S H D]
    out = torch.einsum("bshd,hkd->bshk", found, value.unflatten(0, (heads, -1)))
    return torch.where(some, out.flatten(2) + bias, 0)


def features(
    reader: Reader,
    hidden: Tensor,
    tokens: Tokens,
    heads: int,
    sentinels: tuple[Tensor, Tensor] | None = None,
) -> Features:
    """Features of rows with what a layer gave them [B L D], and of the sentinels for these rows.

    `sentinels` are [L' D] for rows with a picture and [L'' D] for those without; None: zeros.
    Differentiable in everything; fp32.
    """
    hidden = hidden.float()
    asked = _normed(hidden, reader.asked_norm)
    found = attend(
        reader.asked_rows, asked, tokens.asked, reader.asked_value, reader.asked_bias, heads
    )  # [B S K]
    inner = F.linear(found, reader.seen_query, reader.seen_shift).unflatten(-1, (heads, -1))
    inner = inner / math.sqrt(inner.shape[-1])
    keys = reader.seen_key.unflatten(0, (heads, -1))  # [H K/H D]
    rows = torch.einsum("bshk,hkd->bshd", inner, keys).flatten(1, 2)  # [B SH D]
    look = partial(attend, value=reader.seen_value, bias=reader.seen_bias, heads=heads)
    vision = look(rows, asked, tokens.seen).flatten(1)
    words = _normed(hidden, reader.query_norm)
    query = attend(
        reader.query_rows, words, tokens.asked, reader.query_value, reader.query_bias, heads
    ).flatten(1)
    if sentinels is None:
        return Features(vision, query, torch.zeros_like(vision), tokens.pictured)
    both = _normed(torch.cat(sentinels).float(), reader.asked_norm)  # [L'+L'' D]
    mine = torch.arange(len(both), device=both.device) < len(sentinels[0])
    mine = mine == tokens.pictured[:, None]  # [B L'+L'']
    sentinel = look(rows, both.expand(len(hidden), -1, -1), mine).flatten(1)
    return Features(vision, query, sentinel, tokens.pictured)


def _normed(x: Tensor, norm: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm[0], norm[1], EPS)


def cleared(vision: Tensor, pictured: Tensor) -> Tensor:
    """Vision features [B SK] with the two columns that keep out experts of the other kind."""
    far = torch.full_like(vision[:, 0], -FAR)
    columns = torch.stack([torch.where(pictured, 0, far), torch.where(pictured, far, 0)], 1)
    return torch.cat([vision, columns], 1)


def reader_of(entry: Experts, tensors: Mapping[str, Tensor]) -> Reader:
    """The reader that an entry's tensors hold, in fp32."""
    names = (field.replace("_", ".", 1) for field in Reader._fields)
    return Reader(*(tensors[f"{entry.name}.{name}"].float() for name in names))


def experts(model: Model, header: Header, entry: Experts, tensors: Mapping[str, Tensor]) -> Change:
    """What a pool of experts does to a model: a rewrite of its layer's output."""
    layer = model.card.layer_of(canonical(model.card, entry.name))
    if layer is None:
        raise UnknownSite(
            f"experts must stand at a decoder layer of {model.card.id}, and {entry.name!r} is in "
            "none."
        )
    # One model may carry several pools at one layer: each has notes of its own.
    note = f"{entry.name}.experts.{len(model.deltas)}."
    own = {part: tensors[f"{entry.name}.{part}"] for part in ("down", "up", "norm")}
    stacked = bool(header.stack)
    if stacked:
        own |= {part: own[part].flatten(0, 1) for part in ("down", "up")}
    choose = _chooser(entry, tensors, stacked)

    def rewrite(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        hidden = y.reshape(*batch.mask.shape, -1)
        if f"{note}ids" in batch.notes:
            routes = Routes(*(batch.notes[note + field] for field in Routes._fields))
        else:
            with torch.no_grad():
                routes = choose(batch, hidden.detach())
            assert isinstance(batch.notes, dict)
            batch.notes.update({note + field: t for field, t in routes._asdict().items()})
        norm = (own["norm"][0].to(hidden.device), own["norm"][1].to(hidden.device))
        lengths = batch.mask.sum(1)
        return lora_moe.apply(
            hidden, own["down"], own["up"], routes, norm=norm, eps=EPS, lengths=lengths
        ).view(y.shape)

    path = f"{model.card.layers}.{layer}"

    def rewrites(batch: Batch) -> Rewrites:
        return {path: partial(rewrite, batch)}

    return Change(rewrites=rewrites)


def _chooser(
    entry: Experts, tensors: Mapping[str, Tensor], stacked: bool
) -> Callable[[Batch, Tensor], Routes]:
    """(batch, the layer's output) -> the experts of each row."""
    reader = reader_of(entry, tensors)
    vision_keys, query_keys, *sentinels = (
        tensors[f"{entry.name}.{part}"].float()
        for part in ("vision_keys", "query_keys", "sentinel", "sentinel_text")
    )
    scale = scale_of(entry.slots, entry.width)
    count = entry.num_experts
    most = min(entry.most or count, count)

    def choose(batch: Batch, hidden: Tensor) -> Routes:
        found = features(
            reader, hidden, tokens_of(batch), entry.heads, (sentinels[0], sentinels[1])
        )
        threshold = scale * (found.vision * found.sentinel).sum(-1)
        inside = batch.prompt.any(1) & (batch.edit >= 0 if stacked else True)
        threshold = torch.where(inside, threshold, torch.inf)
        vision = cleared(found.vision, found.pictured)
        query = found.query
        if entry.blend == "both":
            query = torch.cat([query, found.vision], 1)
        if not stacked:
            return lora_moe.route(
                vision, query, threshold, vision_keys, query_keys, scale=scale, top_k=most
            )
        mine = batch.edit.clamp_min(0)
        single = partial(lora_moe.route, scale=scale, top_k=most)
        routes = torch.vmap(single)(
            vision[:, None], query[:, None], threshold[:, None], vision_keys[mine], query_keys[mine]
        )
        ids, weights, chosen = (part[:, 0] for part in routes)
        # the experts of all edits stand in one row
        return Routes(torch.where(ids < 0, ids, ids + mine[:, None] * count), weights, chosen)

    return choose
