"""The ways to put an editor to the test, as streams of measured steps.

    single      n independent edits, each from the base, run side by side
    sequential  n edits one after another, the base back before each group
    lifelong    n edits one after another; after 1, 10, 100, ... all edits so far are asked

All are generators over *steps*. What a step holds is decided by the arguments alone, never by what
was measured on the way, so that a run that was killed can leave out finished steps and end with the
same rows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from errata.functional import Case, Delta, Editor, Model, Query, prefix
from errata.functional.bind import bind
from errata.functional.errors import ErrataError
from errata.functional.stacks import unstack

from .checkpoint import Mark, Marks
from .clock import part
from .ledger import Answer
from .memory import measured
from .probes import Ask, Measured, Terms, measure, row_bytes
from .shared import Shared
from .sources import queries_of

__all__ = ["Result", "Step", "lifelong", "reach_of", "sequential", "single"]

Moment = Literal["edit", "gap", "end", "length"]

MOST_EDITS = 64  # side by side, whatever the budget
TRAINED = 5  # a delta, its gradient, two moments, and the copy it is written to
KEPT = 34  # values of model width per token that autograd keeps of a layer


class Result(NamedTuple):
    """One probe under one scorer."""

    number: int  # of the case
    case: Case
    probe: str
    index: int
    query: Query
    moment: Moment
    gap: int
    scorer: str
    base: float | None
    score: float | None
    before: Answer
    after: Answer
    kl: float | None = None
    same: bool | None = None
    ppl_r: float | None = None


class Step(NamedTuple):
    """What is finished together: results, the deltas that were made, and what it cost."""

    number: int
    of: int
    cases: int  # edits made
    results: list[Result]
    deltas: dict[str, Delta]  # by a name fit for a file
    edit_seconds: float
    probe_seconds: float
    peak_bytes: int


class _About(NamedTuple):
    """A case whose probes are asked, and when."""

    number: int
    case: Case
    moment: Moment = "edit"
    gap: int = 0
    edit: int = 0  # number in a stacked delta


class _Clock:
    """Seconds of stretches of work, waiting for the device at their ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        now = self._now()
        spent, self._last = now - self._last, now
        return spent


def single(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    terms: Terms,
    *,
    seed: int = 0,
    together: int = 0,
    done: Collection[int] = (),
    shared: Shared | None = None,
) -> Iterator[Step]:
    """n independent edits, each from the base; probes before and after.

    `together` edits run side by side; with 0 the first case runs alone, and the size of its delta
    says how many of the others fit into `terms.budget`. Steps whose numbers are in `done` are left
    out. All edits start from one state, drawn from `seed`.

    Cost of a step: one optimisation for all its edits, one prefix per distinct question, and from
    the cut on one pass of the base per question and one of the edited model per ask.
    """
    device = _device(model)
    model = shared.model if shared else model
    state = editor.init(model, torch.Generator().manual_seed(seed))
    if together:
        chunks = [slice(i, i + together) for i in range(0, len(cases), together)]
    else:
        chunks = [slice(0, 1)]
    number = 0
    while number < len(chunks):
        chunk = cases[chunks[number]]
        wanted = number not in done
        sizing = number == 0 and not together and len(cases) > 1
        if not (wanted or sizing):
            number += 1
            continue
        clock = _Clock(device)
        with measured(device) as peak:
            first = chunks[number].start
            with _naming(model, chunk):
                _open(shared, range(first, first + len(chunk)))
                with part("edit"):
                    delta = editor.each(model, state, [case.edit for case in chunk])
            edit_seconds = clock.lap()
            if sizing:
                size = _fitting(model, delta, cases, terms.budget, shared)
                chunks += [slice(i, i + size) for i in range(1, len(cases), size)]
            results = []
            if wanted:
                asked = [_About(first + e, case, edit=e) for e, case in enumerate(chunk)]
                results = _ask(model, delta, asked, terms, shared)
        if wanted:
            files = {f"case-{first + e:05d}": one for e, one in enumerate(unstack(delta))}
            yield Step(number, len(chunks), len(chunk), results, files, edit_seconds, clock.lap(),
                       peak.bytes)  # fmt: skip
        number += 1


def sequential(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    terms: Terms,
    *,
    seed: int = 0,
    group: int = 0,
    gaps: Sequence[int] = (),
    done: Collection[int] = (),
    marks: Marks | None = None,
    shared: Shared | None = None,
) -> Iterator[Step]:
    """Edits one after another on the same model; each group of `group` starts from the base.

    A case is probed right after its edit, `g` edits later for each g in `gaps`, and once more after
    the last edit of its group. Every edit is a step, and so is the end of a group. Edits of
    finished steps that a later step builds on are taken from `marks`; those made since the last
    mark are made again, and come out the same.
    """
    group = group or len(cases)
    starts = range(0, len(cases), group)
    of = len(cases) + len(starts)
    device = _device(model)
    model = shared.model if shared else model
    for turn, start in enumerate(starts):
        members = cases[start : start + group]
        first, last = start + turn, start + turn + len(members)  # steps: its first edit, its end
        made = next((k for k in range(len(members) + 1) if first + k not in done), None)
        if made is None:
            continue
        state, delta, begin = editor.init(model, torch.Generator().manual_seed(seed)), None, 0
        mark = marks.recall(start, device) if marks and made else None
        if mark and mark.edits <= made:
            begin, state, delta = mark
        for k in range(begin, len(members)):
            clock = _Clock(device)
            with measured(device) as peak:
                with _naming(model, members[k : k + 1]):
                    _open(shared, [start + k])
                    with part("edit"):
                        delta, state = editor.edit(model, state, [members[k].edit])
                edit_seconds = clock.lap()
                if k < made:
                    continue
                about = [_About(start + k, members[k])]
                about += [_About(start + k - g, members[k - g], "gap", g) for g in gaps if g <= k]
                results = _ask(model, delta, about, terms, shared)
            yield Step(first + k, of, 1, results, {}, edit_seconds, clock.lap(), peak.bytes)
            if marks:  # only now: whoever asks for more has kept the step
                marks.keep(start, Mark(k + 1, state, delta))
        if delta is not None:
            clock = _Clock(device)
            with measured(device) as peak:
                late = len(members) - 1
                about = [_About(start + k, c, "end", late - k) for k, c in enumerate(members)]
                results = _ask(model, delta, about, terms, shared)
            files = {f"group-{turn:04d}": delta}
            yield Step(last, of, 0, results, files, 0.0, clock.lap(), peak.bytes)


def lifelong(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    terms: Terms,
    *,
    lengths: Sequence[int],
    asked: int = 0,
    seed: int = 0,
    done: Collection[int] = (),
    marks: Marks | None = None,
    shared: Shared | None = None,
) -> Iterator[Step]:
    """Edits one after another; after n of them, n in `lengths` and at the end, all n are asked.

    With `asked` at most so many of the n, evenly spread, the first and the last among them. A
    result's gap is n: moment "length" with gap 100 is the model after 100 edits, asked about these.
    Every edit is a step; steps go on from `marks` as those of `sequential` do.
    """
    device, of = _device(model), len(cases)
    ends = {*lengths, of}
    made = next((k for k in range(of) if k not in done), of)
    if made == of:
        return
    model = shared.model if shared else model
    state, delta, begin = editor.init(model, torch.Generator().manual_seed(seed)), None, 0
    mark = marks.recall(0, device) if marks and made else None
    if mark and mark.edits <= made:
        begin, state, delta = mark
    for k in range(begin, of):
        clock = _Clock(device)
        with measured(device) as peak:
            with _naming(model, cases[k : k + 1]):
                _open(shared, [k])
                with part("edit"):
                    delta, state = editor.edit(model, state, [cases[k].edit])
            edit_seconds = clock.lap()
            if k < made:
                continue
            results = []
            if k + 1 in ends:
                chosen = _spread(k + 1, asked)
                about = [_About(n, cases[n], "length", k + 1) for n in chosen]
                results = _ask(model, delta, about, terms, shared)
        files = {f"edits-{k + 1:05d}": delta} if k + 1 in ends else {}
        yield Step(k, of, 1, results, files, edit_seconds, clock.lap(), peak.bytes)
        if marks:  # only now: whoever asks for more has kept the step
            marks.keep(0, Mark(k + 1, state, delta))


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread; all with 0."""
    if not most or count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / max(1, most - 1)) for k in range(most)})


def _open(shared: Shared | None, numbers: Collection[int]) -> None:
    if shared:
        shared.open(numbers)


def _ask(
    model: Model, delta: Delta, about: Sequence[_About], terms: Terms, shared: Shared | None
) -> list[Result]:
    """All probes of these cases, in order: case, probe, index, scorer."""
    bound, reach = bind(model, delta), reach_of(model, delta)
    found: list[tuple[tuple[_About, str, int, Query], Measured]] = []
    numbers = [one.number for one in about]
    for some in shared.slices(numbers) if shared else [slice(None)]:
        asked = [(one, *probe) for one in about[some] for probe in queries_of(one.case)]
        asks = [Ask(probe, query, one.edit) for one, probe, _, query in asked]
        with _naming(model, [one.case for one in about[some]]):
            _open(shared, numbers[some])
            found += zip(asked, measure(model, bound, asks, reach, terms))
    return [
        Result(one.number, one.case, probe, index, query, one.moment, one.gap, scorer,
               *got.scores[scorer], got.before, got.after, got.kl, got.same, got.ppl_r)
        for (one, probe, index, query), got in found
        for scorer in got.scores
    ]  # fmt: skip


def reach_of(model: Model, delta: Delta) -> prefix.Reach:
    """The lowest place a delta acts on."""
    begins = {entry.begins() for entry in delta.header.entries}
    if "read" in begins:
        return prefix.Reach(embed=True)
    if "rows" in begins:
        return prefix.Reach()
    reach = prefix.reach(model.card, [entry.name for entry in delta.header.entries])
    whole = any(entry.whole() for entry in delta.header.entries)
    return reach._replace(scored=reach.scored and not whole)


def _fitting(
    model: Model, delta: Delta, cases: Sequence[Case], budget: int, shared: Shared | None
) -> int:
    """How many edits like this one may run side by side: its optimiser, and what autograd keeps."""
    card, reach = model.card, reach_of(model, delta)
    own = sum(t.numel() * t.element_size() for t in delta.tensors.values()) // delta.header.stack
    longest = max(cases, key=lambda case: len(case.edit.prompt) + len(case.edit.target)).edit
    with _naming(model, cases):
        inputs = model.read([longest])
    scored, tokens = inputs.labels.shape[1], inputs.ids.shape[1]
    kept = scored if reach.scored else tokens
    layers = max(1, card.num_layers - reach.layer)
    graph = 4 * (KEPT * layers * kept * card.width + 3 * scored * card.vocab)
    each = TRAINED * own + graph + row_bytes(model, tokens)
    each += shared.case_bytes if shared else 0
    return max(1, min(MOST_EDITS, budget // each))


def _device(model: Model) -> torch.device:
    return next(iter(model.params.values())).device


@contextlib.contextmanager
def _naming(model: Model, cases: Sequence[Case]) -> Iterator[None]:
    """Say which case a fault is about: the first whose questions can not be read, else all."""
    try:
        yield
    except ErrataError as fault:
        for case in cases:
            try:
                model.read([query for _, _, query in queries_of(case)])
            except ErrataError as own:
                raise type(own)(f"case {case.id!r}: {own}") from own
        if len(cases) == 1:
            raise type(fault)(f"case {cases[0].id!r}: {fault}") from fault
        raise
