"""SERAC: edits are remembered, not written; a classifier says which question one of them is about.

Memory holds every edit in a small width. A question t is compared with each by a classifier e that
reads its prompt and pictures, and where it is in scope a small model c, which sees the edit too,
answers in the base's place (`functional/scope.py` has the arithmetic, `scope_net.py` the network):

    s = max_n exp(-|e(x_n) - e(t)|^2);   soft: (1 - s) p + s c,   hard: c if s > 1/2, else p

Training minimises, over classifier and c alike, with the cases of a lesson remembered together,

    NLL_c(its own edit) - log s_own - log(1 - max of the others)      where an edit should reach
    - log(1 - max s)  (soft: + KL(p || mixture))                      where nothing should change

Both read the base's rows at depth 0 (embeddings, frozen visual features) and c is read by the
base's final norm and head, so there is no second tokenizer, vision tower or language model. An
answer is kept as the residual streams that the head reads as its tokens: with J the Jacobian of the
logits at the empty residual, centred, r_y = (J^T J / V + 3 mean I)^-1 J_y, to which c can point.

Sources: Mitchell et al. 2022, "Memory-Based Model Editing at Scale" (arXiv 2206.06520),
eric-mitchell/serac; EasyEdit `trainer/algs/SERAC.py`; LiveEdit `serac_vl.py` for a classifier of
embeddings. Different from EasyEdit: the classifier never sees an answer, and it sees pictures (the
same question about another picture always fired); pictures reach c by a trained map (theirs is
random, anew in each edit); keys are computed once (theirs again in every forward), and a sequence
keeps all edits (theirs the last).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import Batch, Delta, Editor, EditRecord, Model, Query, Scope, prefix, rows
from errata.functional.entries import Gate, Sizes
from errata.functional.losses import kl, nll, scored
from errata.functional.places import canonical
from errata.functional.records import base_of, header_for
from errata.functional.scope import mixed, read_as
from errata.functional.scope_algebra import padded
from errata.functional.scope_net import (
    Memory,
    Net,
    answered,
    classify,
    fresh,
    memorise,
    named,
    row_of,
    say,
)  # fmt: skip
from errata.functional.types import Learner

from . import statefile
from .fit import PUBLISHED, Course, FitConfig, Lesson

__all__ = [
    "PRESETS", "TRAINING", "Remembering", "SeracConfig", "Slots", "about", "course", "kept",
    "reader_of", "serac", "similarity_loss",
]  # fmt: skip

_Size = Annotated[int, msgspec.Meta(ge=1)]


class SeracConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="serac"
):
    """Settings of SERAC; the sizes are those of the small network, for any base."""

    gate: Gate = "hard"
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5  # of a hard gate
    width: _Size = 256
    heads: _Size = 8
    classifier: _Size = 4  # layers
    counterfactual: _Size = 4  # layers
    inner: _Size = 1024
    key: _Size = 128  # width of either half of what is compared
    looks: _Size = 8  # rows that the pictures of a question are summed up in
    end: bool = True  # teach the end of the answer too, so that free generation stops there
    trained: str = ""  # "shipped", or a file that `statefile.keep` wrote; "": untrained


class Slots(NamedTuple):
    """The edits in memory; rows of zeros are padding."""

    keys: Tensor  # [N 2K]
    replies: Tensor  # [N A d]
    scenes: Tensor  # [N m d]
    prompts: Tensor  # [N P d]
    answers: Tensor  # [N A D]


class Remembering(NamedTuple):
    """State of SERAC: the trained network, how the head is read backwards, the edits so far."""

    net: Net
    reader: Tensor  # [D D]
    slots: Slots
    owners: tuple[int, ...] = ()  # the slot of each edit, -1 where a later one took it over
    edits: tuple[EditRecord, ...] = ()


def serac(config: SeracConfig = SeracConfig()) -> Editor:
    """SERAC as an editor: a `scope` delta; nothing is optimised when an edit is made.

    An edit of the same question about the same pictures replaces the earlier one. Untrained, the
    classifier tells questions apart by nothing it has learned and c repeats the edit's answer.
    Raises BadInput for a trained state that is missing or does not fit.

    >>> from errata import adapters
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = serac(SeracConfig(width=16, heads=2, inner=32, key=8))
    >>> state = editor.init(model, torch.Generator().manual_seed(0))
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> delta.header.entries[0].slots
    1
    """

    def init(model: Model, generator: torch.Generator) -> Remembering:
        sizes = _sizes(model, config)
        device = _home(model)[1].device
        net = pytree.tree_map(lambda t: t.to(device), fresh(sizes, generator))
        if config.trained:
            shipped = config.trained == "shipped"
            path = statefile.shipped("serac", model) if shipped else config.trained
            net = statefile.recall(path, net, about(model, config))
        shapes = ((2 * sizes.key,), (0, sizes.width), (sizes.looks, sizes.width), (0, sizes.width),
                  (0, sizes.model))  # fmt: skip
        empty = Slots(*(torch.zeros(0, *shape, device=device) for shape in shapes))
        return Remembering(net, reader_of(model), empty)

    def edit(model: Model, state: Remembering, queries: Sequence[Query]):
        made = _made(model, state, config, queries)
        slots = Slots(*(padded(pair) for pair in zip(state.slots, made)))
        records = header_for(model, "serac", config, (), queries).edits
        owners, chosen = state.owners, list(range(len(state.slots.keys)))
        for number, record in enumerate(records):
            slot = _home_of(record, owners, (*state.edits, *records[:number]))
            if slot is None:
                slot = len(chosen)
                chosen.append(len(state.slots.keys) + number)
            else:
                owners = tuple(-1 if owner == slot else owner for owner in owners)
                chosen[slot] = len(state.slots.keys) + number
            owners = (*owners, slot)
        if chosen != list(range(len(slots.keys))):
            slots = Slots(*(part[torch.tensor(chosen, device=part.device)] for part in slots))
        after = state._replace(slots=slots, owners=owners, edits=state.edits + records)
        return _delta(model, config, after, slots, queries, earlier=state.edits), after

    def each(model: Model, state: Remembering, queries: Sequence[Query]) -> Delta:
        made = _made(model, state, config, queries)
        count = len(queries)
        given = (part[None].expand(count, *part.shape) for part in state.slots)
        slots = Slots(*(padded((old, new[:, None]), 1) for old, new in zip(given, made)))
        owners = []
        for number, record in enumerate(header_for(model, "serac", config, (), queries).edits):
            home = _home_of(record, state.owners, state.edits)
            owners.append(slots.keys.shape[1] - 1 if home is None else home)
            for part in slots:  # a replaced edit's slot stands twice: the first decides
                part[number, owners[-1]] = part[number, -1]
        fresh_state = state._replace(owners=tuple(owners))
        return _delta(model, config, fresh_state, slots, queries, stack=count)

    return Editor("serac", config, init, edit, each)


def course(config: SeracConfig = SeracConfig()) -> Course:
    """How SERAC is trained, for `fit`: the cases of a lesson are one memory, asked everything."""
    editor = serac(config)

    def study(model: Model, state: Remembering, lesson: Lesson, learn: bool):
        return state, (lesson, _answers(model, state.reader, lesson.edit))

    def loss(model: Model, state: Remembering, studied: tuple[Lesson, Tensor]):
        lesson, answers = studied
        net, edit, asks = state.net, lesson.edit, lesson.asks
        own = row_of(net, edit)
        memory = memorise(net, own, edit.at, scored(edit.labels))
        asked = row_of(net, asks)
        most = int((asks.mask & ~asks.image).sum(1).max())  # words of any question, at least
        keys = classify(net, config.heads, own, most), classify(net, config.heads, asked, most)
        gaps = (keys[1][:, None] - keys[0]).square().sum(-1)  # [B E]
        reached = asks.rows - lesson.base.shape[0]  # localities come last
        scope, closest = similarity_loss(gaps, asks.edit, reached, config)
        last = asks.rows if config.gate == "soft" else reached
        home = torch.cat([asks.edit[:reached], closest[reached:last]])
        some = type(asked)(*(part[:last] for part in asked))
        batch = rows.take(asks, slice(0, last))
        given = Memory(*(part[home] for part in memory))
        h, pointer = say(net, config.heads, some, given)
        at = batch.at[..., None]
        h = h.gather(1, at.expand(-1, -1, h.shape[-1]))
        pointer = pointer.gather(1, at.expand(-1, -1, pointer.shape[-1]))
        stream = answered(net, h, pointer, answers[home]).to(batch.hidden.dtype)
        other = read_as(model, model.params, stream, batch.edit)
        told = nll(other[:reached], batch.labels[:reached])
        changed = told.new_zeros(asks.rows - reached)
        if config.gate == "soft":
            share = torch.exp(-gaps[reached:].amin(1))[:, None].expand(batch.labels[reached:].shape)
            both = mixed(lesson.base, other[reached:], share)
            changed = kl(lesson.base, both, batch.labels[reached:])
        return _weighed(lesson, torch.cat([told, changed]), scope)

    return Course(
        learner=Learner(editor, loss),
        sites=lambda model: (_home(model)[0].rpartition(".")[0],),
        trained=lambda state: state.net,
        placed=lambda state, net: state._replace(net=net),
        study=study,
        end=config.end,
        reach=prefix.Reach(),
    )


def similarity_loss(
    gaps: Tensor, own: Tensor, reached: int, config: SeracConfig = SeracConfig()
) -> tuple[Tensor, Tensor]:
    """The classifier's loss of each question [B], and the edit that it finds most similar [B].

    `gaps` [B E] are the squared distances, s = exp(-gap); the first `reached` questions lie in
    the scope of their `own` edit, the others in none. With l(s) = -log s for a soft gate,

        l(s_own) + l(1 - max of the others')     in scope
        l(1 - max s)                             out of it

    Half of the loss is of what an edit should reach, half of what it should not: balanced, as in
    serac's `losses.py`. A hard gate asks on which side of its threshold t a similarity lies, and
    -log s goes on pulling where that is settled, so l(s) = log(1 + exp(8 (gap + log t))) there and
    l(1 - s) = log(1 + exp(-8 (gap + log t))).
    """
    edits = torch.arange(gaps.shape[1], device=gaps.device)
    inside = torch.arange(len(gaps), device=gaps.device) < reached
    mine = (edits == own[:, None]) & inside[:, None]
    # one edit alone has no others: it is as if they were far
    others = torch.where(mine, torch.inf, gaps).amin(1).clamp(1e-6, 50.0)
    right = torch.where(mine, gaps, 0).sum(1)
    if config.gate == "soft":
        return right - torch.log(-torch.expm1(-others)), gaps.argmin(1)
    edge = -math.log(max(config.threshold, 1e-6))
    here = torch.where(inside, F.softplus(SHARP * (right - edge)), 0)
    return here + F.softplus(SHARP * (edge - others)), gaps.argmin(1)


SHARP = 8.0  # how steep a hard gate's loss is about its threshold


def reader_of(model: Model) -> Tensor:
    """[D D]: what turns an answer token's gradient into the residual stream read as that token.

    With J = dz/dh at h = 0 (one product with J per direction, in one batch), centred over
    the vocabulary: (J^T J / V + 3 mean(diag) I)^-1. Unlike the head's own row, which other words of
    a trained vocabulary outdo, the result is read as the word itself (the micro models: all 1,536
    words of the three, own rows 37 to 80 %), whatever norm, tie or scale lies in between.
    """
    like = _home(model)[1]
    width = model.card.width
    zero = like.new_zeros(1, width, width)
    every = torch.eye(width, dtype=like.dtype, device=like.device)[None]
    none = torch.zeros(1, dtype=torch.int64, device=like.device)

    def read(hidden: Tensor) -> Tensor:
        return read_as(model, model.params, hidden, none)

    # J v as the gradient of <J^T u, v> in u: forward mode would go through torch.jit
    there = torch.func.vjp(read, zero)
    back = torch.func.vjp(lambda u: there[1](u)[0], torch.zeros_like(there[0]))
    (found,) = back[1](every)
    columns = found[0].float()  # [D V]
    columns = columns - columns.mean(1, keepdim=True)
    square = columns @ columns.mT / columns.shape[1]
    mean = square.diagonal().mean()
    return torch.linalg.inv(square / mean + 3 * torch.eye(width, device=like.device))


def about(model: Model, config: SeracConfig) -> dict[str, Any]:
    """What a trained state fits: the sizes of the network, and the base whose rows it reads."""
    base = base_of(model, [_home(model)[0]])
    return {
        "editor": "serac",
        "sizes": msgspec.to_builtins(_sizes(model, config)),
        "end": config.end,
        "family": base.family,
        "touched": base.touched,
    }


def kept(state: Remembering) -> Net:
    """What a file of a trained state holds: the weights, in half the bytes."""
    return pytree.tree_map(lambda weight: weight.half(), state.net)


def _weighed(lesson: Lesson, told: Tensor, scope: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    terms = {}
    total = told.new_zeros(())
    for number, (name, weight) in enumerate(lesson.weights.items()):
        mine = lesson.probe == number
        count = mine.sum().clamp_min(1)
        say, gate = (torch.where(mine, x, 0).sum() / count for x in (told, scope))
        terms[name] = say.detach()
        terms[f"{name} scope"] = gate.detach()
        total = total + weight * (say + gate)
    return total, terms


def _sizes(model: Model, config: SeracConfig) -> Sizes:
    fields = ("width", "heads", "classifier", "counterfactual", "inner", "key", "looks")
    return Sizes(model=model.card.width, **{field: getattr(config, field) for field in fields})


def _home(model: Model) -> tuple[str, Tensor]:
    """The token embedding, by which a base is known: the network reads its rows."""
    name = canonical(model.card, f"{model.card.tokens}.weight")
    if name not in model.params:
        name = canonical(model.card, f"{model.card.head}.weight")
    return name, model.params[name]


def _made(model: Model, state: Remembering, config: SeracConfig, queries: Sequence[Query]) -> Slots:
    """One slot for each query, encoded once and for all."""
    with torch.no_grad():
        inputs = model.read(queries, end=True) if config.end else model.read(queries)
        batch = model.embed(model.params, inputs)
        row = row_of(state.net, batch)
        memory = memorise(state.net, row, batch.at, scored(batch.labels))
        keys = classify(state.net, config.heads, row)
        answers = _answers(model, state.reader, batch)
    return Slots(keys, *memory, answers)


def _answers(model: Model, reader: Tensor, batch: Batch) -> Tensor:
    """[B A D] residual streams that the head reads as each row's answer tokens; zeros behind."""
    keep = scored(batch.labels)
    gold = torch.where(keep, batch.labels, 0)[..., None]
    zero = batch.hidden.new_zeros(*batch.labels.shape, model.card.width)

    def lead(hidden: Tensor) -> Tensor:
        logits = read_as(model, model.params, hidden, batch.edit).float()
        return (logits.gather(-1, gold)[..., 0] - logits.mean(-1)).sum()

    found = torch.func.grad(lead)(zero).float() @ reader
    size = found.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    return found / size * keep[..., None]


def _home_of(record: EditRecord, owners: Sequence[int], edits: Sequence[EditRecord]) -> int | None:
    """The slot of an edit of the same question about the same pictures, if there is one."""
    for slot, known in zip(owners, edits):
        if slot >= 0 and known.prompt == record.prompt and known.images == record.images:
            return slot
    return None


def _delta(
    model: Model, config: SeracConfig, state: Remembering, slots: Slots,
    queries: Sequence[Query], earlier: tuple[EditRecord, ...] = (), stack: int = 0,
) -> Delta:  # fmt: skip
    name, weight = _home(model)
    entry = Scope(
        name=name,
        checkpoint=model.card.checkpoint.get(name, name),
        shape=tuple(weight.shape),
        sizes=_sizes(model, config),
        slots=slots.keys.shape[-2],
        replies=slots.replies.shape[-2],
        prompts=slots.prompts.shape[-2],
        owners=state.owners,
        gate=config.gate,
        threshold=config.threshold,
    )
    said = msgspec.structs.replace(config, trained=Path(config.trained).name)  # no one's folders
    header = header_for(model, "serac", said, (entry,), queries, earlier=earlier, stack=stack)
    tensors = {**slots._asdict(), **named(state.net)}
    return Delta(header, {f"{name}.{part}": tensor.detach() for part, tensor in tensors.items()})


PRESETS: dict[str, SeracConfig] = {
    "default": SeracConfig(),
    # EasyEdit's gate: mixed by the similarity; targets without the token that ends an answer
    "easyedit": SeracConfig(gate="soft", end=False),
    # eric-mitchell/serac at test time
    "original": SeracConfig(gate="hard", threshold=0.5, end=False),
    # the micro zoo's: trained states come with the package
    "micro": SeracConfig(
        width=96, heads=4, classifier=2, counterfactual=2, inner=256, key=64, looks=4,
        trained="shipped",
    ),
}  # fmt: skip

TRAINING: dict[str, FitConfig] = {
    # hparams/TRAINING/SERAC/*.yaml
    "easyedit": FitConfig(num_steps=50_000, together=1, lr=1e-5, clip=100.0, weights=PUBLISHED),
    # serac: batches of ten edits, so that other edits are hard negatives
    "original": FitConfig(num_steps=50_000, together=10, lr=1e-5, clip=100.0, weights=PUBLISHED),
}
"""Published trainings: Adam at 1e-5, 0.1 for what an edit should reach, 1 for localities."""
