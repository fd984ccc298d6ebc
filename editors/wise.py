"""WISE: side memories of one linear map, and a gate that only the edits' own prompts open.

A memory is a sparse change D of the map's weight W, zero outside a random mask. It stands beside
the base: a row runs with W + D where the prompt's activation

    a(x) = mean over the prompt's tokens of |phi((W + D) x_t) - phi(W x_t)|_2

reaches a threshold, and with W elsewhere. An edit trains the values of D under the mask,

    L = mean_j -log p(x*_j | image, prompt, x*_<j ; W + D)  +  m(a(edit), a(unrelated))
    m(a, b) = [b - alpha]_+ + [beta - a]_+ + [b - a + gamma]_+

and its threshold is `act_ratio` times a(edit) once it is trained. Edits in sequence share a memory:
every `save_every` of them a new one is begun, its mask drawn anew, and every `merge_every` the full
ones are merged into one (`wise_merge.py`).

Sources: Wang et al. 2024 (arXiv 2405.14768); EasyEdit `models/wise/WISE.py`. Different from it:

* Both sides of the gate are the same: the prompt's own tokens, no padding and no answer, at edit
  and at test (theirs: the mean of all tokens at edit, the largest at test in rows over 100 tokens;
  `statistic="easyedit"` measures so).
* What the gate learns to stay shut for is packaged or yours (`texts`, `unrelated`), never the
  question that locality is then measured by. Questions about the edit's own picture, and the edit's
  question without its picture, can join (`beside`).
* Weight decay acts under the mask only (theirs moves all of W), the map keeps its bias, a mask has
  its ratio exactly and follows from the edit's name, asking a question merges nothing, and the
  answer's loss is a mean over the answer (theirs counts one token of the prompt more, as zero).
* Earlier edits of a memory can be trained along (`replay`), answers and gate both; with all of them
  at hand a memory is trained anew, so that edits one after another are as good as all at once.
* An edit of the same question about the same pictures takes the place of the earlier one: a memory
  that is alone with it goes, and it is not trained along any more (theirs go on answering). Only
  what a full memory holds together with other edits can not be taken out of it.

Cost of an edit: its rows and the unrelated ones once up to the site; then `num_steps` forwards and
backwards of its own rows from the site's layer on (`wise_train.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional import Delta, Editor, EditRecord, Header, Masked, Model, Query
from errata.functional.errors import BadInput
from errata.functional.masked import pack, spread, unpacked
from errata.functional.records import header_for, record

from .wise_merge import merged
from .wise_train import (
    Ready,
    Site,
    WiseConfig,
    draw_mask,
    drawn,
    last,
    picked,
    prepare,
    site_of,
    together,
    train,
)

__all__ = ["PRESETS", "Memory", "Shard", "Side", "WiseConfig", "wise"]


class Side(NamedTuple):
    """A side memory: values at the bits set in a mask of the map, and when it acts."""

    mask: Tensor  # [ceil(O I / 8)] bytes, as `functional.masked.pack` makes them
    values: Tensor  # [K]
    nearest: Tensor  # [] the smallest activation of its edits
    edits: tuple[int, ...] = ()  # their numbers


class Shard(NamedTuple):
    """The memory that edits go into now."""

    side: Side
    room: int  # edits that it still takes
    kept: Ready | None = None  # of its last `replay` edits


class Memory(NamedTuple):
    """State: full memories, the one that is being filled, and the edits so far."""

    seed: int
    full: tuple[Side, ...] = ()
    merged: int = 0  # how many of the full ones, from the first on, are merged already
    shard: Shard | None = None
    edits: tuple[EditRecord, ...] = ()

    @property
    def sides(self) -> tuple[Side, ...]:
        return self.full if self.shard is None else (*self.full, self.shard.side)


def wise(config: WiseConfig = WiseConfig(), unrelated: Sequence[Query] = ()) -> Editor:
    """WISE as an editor: the delta is a `masked` change of one linear map.

    `unrelated`: prompts (with pictures, where the model takes them) that the gate learns to stay
    shut for, in place of `config.texts`. State: the memories. A sequence fills one after another;
    single edits can be taken out where they are alone in one (save_every=1). Raises UnknownSite
    when the site is not in the model, BadSettings where its change could not act on the answer.

    >>> from errata import adapters
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = wise(WiseConfig(num_steps=2, mask_ratio=0.5))
    >>> state = editor.init(model, torch.Generator().manual_seed(0))
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> delta.header.entries[0].counts, delta.header.entries[0].shape
    ((1024,), (32, 64))
    """
    others = tuple(query._replace(target="") for query in unrelated)

    def init(model: Model, generator: torch.Generator) -> Memory:
        site_of(model, config)
        return Memory(int(torch.randint(0, 2**62, (), generator=generator)))

    def edit(model: Model, state: Memory, queries: Sequence[Query]) -> tuple[Delta, Memory]:
        queries = list(queries)
        while queries:
            room = config.save_every if state.shard is None else state.shard.room
            state = _fill(model, state, queries[:room], config, others)
            queries = queries[room:]
        owner = {k: number for number, side in enumerate(state.sides) for k in side.edits}
        owners = tuple(owner.get(k, -1) for k in range(len(state.edits)))
        described = _header(model, config, (), state.sides, owners, earlier=state.edits)
        return _delta(described, [state.sides], config), state

    def each(model: Model, state: Memory, queries: Sequence[Query]) -> Delta:
        if state.edits:
            raise BadInput(
                f"edits side by side must start from a fresh state, and this one holds "
                f"{len(state.edits)}: take `editor.init(model, generator)`, or `editor.edit`."
            )
        site, made = site_of(model, config), tuple(map(record, queries))
        sides = [_empty(model, site, state.seed, one, config) for one in made]
        ready = prepare(model, site, queries, made, state.seed, config, others)
        where = torch.stack([_positions(side, site) for side in sides])
        start = torch.stack([side.values for side in sides])
        values, nearest = train(model, site, ready, where, start, config)
        sides = [side._replace(values=v, nearest=a) for side, v, a in zip(sides, values, nearest)]
        owners, count = (0,) * len(sides), len(sides)
        described = _header(model, config, queries, sides[:1], owners, stack=count)
        return _delta(described, [[side] for side in sides], config)

    return Editor("wise", config, init, edit, each)


def _fill(
    model: Model,
    state: Memory,
    queries: Sequence[Query],
    config: WiseConfig,
    others: Sequence[Query],
) -> Memory:
    """Train the current memory on a few more edits; put it aside where it is full."""
    site, every = site_of(model, config), tuple(map(record, queries))
    state = _outdated(state, every)
    final = {(one.prompt, one.images): k for k, one in enumerate(every)}  # the last of a question
    made = tuple(every[k] for k in final.values())
    asked = [queries[k] for k in final.values()]
    shard = state.shard or Shard(
        _empty(model, site, state.seed, made[0], config), config.save_every
    )
    ready = prepare(model, site, asked, made, state.seed, config, others)
    ready = together(shard.kept, ready)
    ready = ready._replace(batch=ready.batch._replace(edit=torch.zeros_like(ready.batch.edit)))
    where = _positions(shard.side, site)[None]
    # With all its edits at hand a memory is trained anew: one after another is all at once.
    unseen = len(shard.side.edits) + len(asked) - len(ready.given)
    start = shard.side.values if unseen else torch.zeros_like(shard.side.values)
    values, nearest = train(model, site, ready, where, start[None], config)
    numbers = [len(state.edits) + k for k in final.values()]
    side = shard.side._replace(
        values=values[0],
        nearest=torch.minimum(shard.side.nearest, nearest[0]) if unseen else nearest[0],
        edits=(*shard.side.edits, *numbers),
    )
    shard = Shard(side, shard.room - len(queries), last(ready, config.replay))
    state = state._replace(edits=state.edits + every, shard=shard)
    if shard.room:
        return state
    state = state._replace(full=(*state.full, side), shard=None)
    return _merge(site, state, config)


def _outdated(state: Memory, made: Sequence[EditRecord]) -> Memory:
    """The state without what it was told of the same questions about the same pictures."""
    again = {(one.prompt, one.images) for one in made}
    gone = {k for k, one in enumerate(state.edits) if (one.prompt, one.images) in again}
    stay = [n for n, side in enumerate(state.full) if not gone.issuperset(side.edits)]
    shard = state.shard
    if shard is not None and not gone.isdisjoint(shard.side.edits):
        before = shard.side.edits
        edits, kept = tuple(k for k in before if k not in gone), shard.kept
        if kept is not None:  # rows of the last edits
            known = before[len(before) - len(kept.given) :]
            at = [row for row, k in enumerate(known) if k not in gone]
            kept = picked(kept, torch.tensor(at)) if at else None
        shard = shard._replace(side=shard.side._replace(edits=edits), kept=kept)
    return state._replace(
        full=tuple(state.full[n] for n in stay),
        merged=sum(n < state.merged for n in stay),
        shard=shard if shard is not None and shard.side.edits else None,
    )


def _header(
    model: Model, config: WiseConfig, queries: Sequence[Query], sides: Sequence[Side],
    owners: tuple[int, ...], *, earlier: tuple[EditRecord, ...] = (), stack: int = 0,
) -> Header:  # fmt: skip
    site = site_of(model, config)
    entry = Masked(
        name=site.weight,
        checkpoint=model.card.checkpoint.get(site.weight, site.weight),
        shape=tuple(model.params[site.weight].shape),
        counts=tuple(len(side.values) for side in sides),
        owners=owners,
        activation=site.activation,
        statistic=config.statistic,
        transposed=site.transposed,
    )
    return header_for(model, "wise", config, (entry,), queries, earlier=earlier, stack=stack)


def _empty(model: Model, site: Site, seed: int, first: EditRecord, config: WiseConfig) -> Side:
    """A memory of zeros, under a mask that its first edit's name draws."""
    device = model.params[site.weight].device
    mask = draw_mask(site.size, config.mask_ratio, drawn(seed, first, "mask"))
    return Side(
        pack(mask).to(device),
        torch.zeros(int(mask.sum()), device=device),
        torch.tensor(torch.inf, device=device),
    )


def _positions(side: Side, site: Site) -> Tensor:
    """[K] int64, ascending."""
    return unpacked(side.mask, site.size[0] * site.size[1]).nonzero()[:, 0]


def _merge(site: Site, state: Memory, config: WiseConfig) -> Memory:
    """Merge the full memories that are not merged yet, once enough edits have gone into them."""
    fresh = state.full[state.merged :]
    if sum(len(side.edits) for side in fresh) < config.merge_every:
        return state
    before, weights = state.full[: state.merged], [1.0 / len(fresh)] * len(fresh)
    if config.mode == "merge" and before:
        fresh = (*fresh, *before)  # as in EasyEdit, what was merged earlier counts for 0.6
        weights = [0.4 * weight for weight in weights] + [0.6]
        before = ()
    changes = torch.stack([spread(side.mask, side.values, site.size).flatten() for side in fresh])
    named = drawn(state.seed, state.edits[fresh[0].edits[0]], "merge")
    total = merged(changes, weights, config.merge, config.density, named)
    mask = unpacked(torch.stack([side.mask for side in fresh]), len(total)).any(0)
    side = Side(
        pack(mask),
        total[mask],
        torch.stack([side.nearest for side in fresh]).min(),
        tuple(sorted(k for side in fresh for k in side.edits)),
    )
    return state._replace(full=(*before, side), merged=len(before) + 1)


def _delta(header: Header, edits: Sequence[Sequence[Side]], config: WiseConfig) -> Delta:
    """The tensors of one delta per entry of `edits`, stacked where the header says so."""
    tensors: dict[str, list[Tensor]] = {"mask": [], "values": [], "thresholds": []}
    for sides in edits:
        tensors["mask"].append(torch.stack([side.mask for side in sides]))
        tensors["values"].append(torch.cat([side.values for side in sides]))
        nearest = torch.stack([side.nearest for side in sides])
        tensors["thresholds"].append(config.act_ratio * nearest)
    stacked = {part: torch.stack(found) for part, found in tensors.items()}
    name = header.entries[0].name
    return Delta(header, {f"{name}.{p}": x if header.stack else x[0] for p, x in stacked.items()})


# EasyEdit's yaml for vision-language models: ten steps, ratio 0.4, the end of an answer untaught.
_EASYEDIT: dict[str, Any] = {
    "num_steps": 10, "act_ratio": 0.4, "num_texts": 1, "layer": 23, "end": False
}  # fmt: skip

PRESETS: dict[str, WiseConfig] = {
    # Llama-2-7b, Mistral-7b, Llama-3.2-3b; the paper's settings of its text-only models.
    "easyedit-llama": WiseConfig(layer=27, num_texts=1, end=False),
    # `silu` there for a ReLU model: here the model's own.
    "easyedit-blip2": WiseConfig(site="mlp.up", mode="merge", **_EASYEDIT),
    "easyedit-minigpt4": WiseConfig(mode="merge", **_EASYEDIT),
    "easyedit-llava-onevision": WiseConfig(**_EASYEDIT),
    "easyedit-qwen2-vl": WiseConfig(**_EASYEDIT),
    "easyedit-qwen3-vl": WiseConfig(**{**_EASYEDIT, "layer": 30}),
    # As qwen2-vl, by EasyEdit's two statistics: the mean of an edit against the largest of a long
    # prompt, so that a gate is open for nearly every picture.
    "easyedit-statistic": WiseConfig(statistic="easyedit", **_EASYEDIT),
    # The micro zoo's: the map that reads the normed stream, at the prompt's end. There activations
    # tell questions and creatures apart; with mlp.down and the mean, 96 to 100 % of other questions
    # about an edit's picture reach 0.6 to 0.8 of its activation (24 cases, LLaVA).
    "micro": WiseConfig(
        site="mlp.up",
        layer=-1,
        optimizer="adam",
        lr=3e-2,
        weight_decay=0.0,
        num_steps=250,
        clamp=None,
        alpha=0.0,
        beta=80.0,
        gamma=40.0,
        act_ratio=0.8,
        statistic="last",
        num_texts=8,
        beside=("picture", "question"),
        stop_loss=0.05,
        stop_change=1.0,
        replay=9,
        save_every=10,
        merge_every=1_000_000,  # the maps are small: memories stay apart
    ),
}
