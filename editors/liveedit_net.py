"""LiveEdit's networks: what reads routing features, and what makes an edit's expert.

Each is a cross-attention from a few learned slots to tokens of the residual stream:

    reader    u = Attn(slots, LN(Q)),  f = Attn(u, LN(V));   g = Attn(slots', LN'(Q))
    maker     C = Attn(slots, LN([V; Q; A])) * strength / sqrt(R)        one row per slot

with one reader for edits (their keys), one for questions, and makers of the down and up factors.
The keys' bias of an attention moves all scores of its softmax alike and is left out. The arithmetic
is `functional/experts.py`'s, where constant queries are absorbed into the keys.

Source: qizhou000/LiveEdit `editor/vllm_editors/liveedit/modules.py`, QVExtractor and
LowRankGenerator. Legend: D width of the decoder · S slots · K width of a slot · H heads · R rank ·
B rows · L tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import Batch
from errata.functional.experts import EPS, Reader, attend, features, tokens_of

if TYPE_CHECKING:
    from .liveedit import LiveEditConfig

__all__ = ["Attention", "Look", "Maker", "Nets", "Pool", "absorbed", "made", "networks", "pool_of"]


class Attention(NamedTuple):
    """A cross-attention: maps of queries (with shift), keys, and values (with bias)."""

    query: Tensor  # [K K]
    shift: Tensor  # [K]
    key: Tensor  # [K D]
    value: Tensor  # [K D], of a maker [D D]
    bias: Tensor  # [K], of a maker [D]


class Pool(NamedTuple):
    """Experts and their keys."""

    vision_keys: Tensor  # [N SK+2]
    query_keys: Tensor  # [N SK], with blend "both" [N 2SK]
    down: Tensor  # [N R D]
    up: Tensor  # [N R D]


class Look(NamedTuple):
    """What reads the features of a row."""

    norm: Tensor  # [2 D] before `asked` and `seen`: weight and bias
    slots: Tensor  # [S K]
    asked: Attention
    seen: Attention
    query_norm: Tensor  # [2 D]
    query_slots: Tensor  # [S K]
    query: Attention


class Maker(NamedTuple):
    """What makes one factor of an expert."""

    norm: Tensor  # [2 D]
    slots: Tensor  # [R K]
    attention: Attention
    places: Tensor  # [P D] added to the prompt's last token and those of the answer, in order


class Nets(NamedTuple):
    """All that is trained."""

    edit: Look  # an edit's keys
    ask: Look  # a question's features
    down: Maker
    up: Maker
    norm: Tensor  # [2 D] of what experts are given
    sentinel: Tensor  # [L' D] the picture that stands for "no edit"
    sentinel_text: Tensor  # [L'' D] the same for rows without a picture


def networks(
    width: int, slots: int, size: int, rank: int, sentinel: int, sentinel_text: int,
    generator: torch.Generator, places: int = 0,
) -> Nets:  # fmt: skip
    """Fresh networks: linear maps uniform in 1/sqrt(in), slots normal, as the original's.

    The two readers start alike and without a bias of vision, so that from the start a question is
    nearer to its own edit than to the sentinel; the original's are drawn apart.
    """

    def uniform(*shape: int, fan: int) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan)

    def normal(rows: int, columns: int) -> Tensor:  # kaiming_normal_ of [1 rows columns]
        return torch.randn(rows, columns, generator=generator) * math.sqrt(2 / (rows * columns))

    def norm() -> Tensor:
        return torch.stack([torch.ones(width), torch.zeros(width)])

    def attention(out: int) -> Attention:
        return Attention(
            query=uniform(size, size, fan=size),
            shift=uniform(size, fan=size),
            key=uniform(size, width, fan=width),
            value=uniform(out, width, fan=width),
            bias=uniform(out, fan=width),
        )

    def look() -> Look:
        return Look(
            norm(), normal(slots, size), attention(size), attention(size),
            norm(), normal(slots, size), attention(size),
        )  # fmt: skip

    def maker() -> Maker:
        drawn = torch.randn(places, width, generator=generator)
        return Maker(norm(), normal(rank, size), attention(width), drawn)

    alike = look()
    blind = alike.seen._replace(bias=torch.zeros_like(alike.seen.bias))
    alike = alike._replace(seen=blind)
    again = pytree.tree_map(torch.clone, alike)  # each is trained on its own
    return Nets(
        alike, again, maker(), maker(), norm(), normal(sentinel, width),
        normal(sentinel_text, width),
    )  # fmt: skip


def absorbed(look: Look, heads: int) -> Reader:
    """The reader that a `Look` amounts to, constant queries folded into their keys.

    row_(s,h) = W_k,h^T (W_q slot_s + b)_h / sqrt(K/H)
    """
    return Reader(
        asked_norm=look.norm,
        asked_rows=_rows(look.slots, look.asked, heads),
        asked_value=look.asked.value,
        asked_bias=look.asked.bias,
        seen_query=look.seen.query,
        seen_shift=look.seen.shift,
        seen_key=look.seen.key,
        seen_value=look.seen.value,
        seen_bias=look.seen.bias,
        query_norm=look.query_norm,
        query_rows=_rows(look.query_slots, look.query, heads),
        query_value=look.query.value,
        query_bias=look.query.bias,
    )


def made(
    maker: Maker, hidden: Tensor, keep: Tensor, place: Tensor, heads: int, strength: float
) -> Tensor:
    """One factor of each row's expert, from the tokens to keep [B L]: [B R D].

    `place` [B L] is 1 at the prompt's last token, 2 at the answer's first, and so on; else 0.
    """
    x = hidden.float()
    x = F.layer_norm(x, x.shape[-1:], maker.norm[0], maker.norm[1], EPS)
    known = len(maker.places)
    if known:
        own = maker.places[(place - 1).clamp(0, known - 1)]
        x = x + torch.where((place > 0)[..., None], own, 0)
    rows = _rows(maker.slots, maker.attention, heads)
    out = attend(rows, x, keep, maker.attention.value, maker.attention.bias, heads)
    return out * (strength / math.sqrt(len(maker.slots)))


def pool_of(
    nets: Nets, config: LiveEditConfig, hidden: Tensor, batch: Batch, blind: Tensor | None = None
) -> Pool:
    """Experts and keys from what the layer gives the rows of edits [B L D]; differentiable.

    Keys are made from the questions alone: the answer is not seen. Factors are made from picture,
    prompt and answer, in `blind` rows [B] from the prompt's last token and the answer.
    """
    tokens = tokens_of(batch)
    hidden = hidden.reshape(*batch.mask.shape, -1)
    keys = features(absorbed(nets.edit, config.heads), hidden, tokens, config.heads)
    kind = torch.stack([keys.pictured, ~keys.pictured], 1).float()
    query = torch.cat([keys.query, keys.vision], 1) if config.blend == "both" else keys.query
    keep = tokens.seen | tokens.asked | tokens.answer
    if blind is not None:
        keep = torch.where(blind[:, None], batch.prompt | tokens.answer, keep)
    behind = batch.prompt | tokens.answer
    place = torch.where(behind, behind.int().cumsum(1), 0)
    down, up = (
        made(maker, hidden, keep, place, config.heads, config.strength)
        for maker in (nets.down, nets.up)
    )
    return Pool(torch.cat([keys.vision, kind], 1), query, down, up)


def _rows(slots: Tensor, attention: Attention, heads: int) -> Tensor:
    """[SH D]"""
    queries = F.linear(slots, attention.query, attention.shift).unflatten(-1, (heads, -1))
    queries = queries / math.sqrt(queries.shape[-1])
    keys = attention.key.unflatten(0, (heads, -1))  # [H K/H D]
    return torch.einsum("shk,hkd->shd", queries, keys).flatten(0, 1)
