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

from .checkpoint import CheckpointFile, SequenceCheckpoint
from .clock import section
from .ledger import ProbeAnswer
from .memory import measure_peak
from .probes import EvaluationConfig, ProbeQuestion, ProbeResult, evaluate, row_num_bytes
from .shared import SharedBasePass
from .sources import questions_of

__all__ = ["Result", "Step", "run_lifelong", "delta_depth", "run_sequential", "run_single"]

EvaluatedAt = Literal["after_edit", "after_gap", "end", "after_length"]

MAX_PARALLEL_EDITS = 64  # side by side, whatever the budget
OPTIMIZER_COPIES = 5  # a delta, its gradient, two moments, and the copy it is written to
ACTIVATIONS_PER_TOKEN = 34  # values of model width per token that autograd keeps of a layer


class Result(NamedTuple):
    """One probe under one scorer."""

    case_number: int  # of the case
    case: Case
    probe: str
    index: int
    query: Query
    evaluated_at: EvaluatedAt
    gap: int
    scorer: str
    base: float | None
    score: float | None
    before: ProbeAnswer
    after: ProbeAnswer
    kl: float | None = None
    generation_unchanged: bool | None = None
    ppl_r: float | None = None


class Step(NamedTuple):
    """What is finished together: results, the deltas that were made, and what it cost."""

    number: int
    num_units: int
    cases: int  # edits made
    results: list[Result]
    deltas: dict[str, Delta]  # by a name fit for a file
    edit_seconds: float
    probe_seconds: float
    peak_bytes: int


class _EvaluatedCase(NamedTuple):
    """A case whose probes are asked, and when."""

    case_number: int
    case: Case
    evaluated_at: EvaluatedAt = "after_edit"
    gap: int = 0
    edit_index: int = 0  # number in a stacked delta


class _Stopwatch:
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


def run_single(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    evaluation_config: EvaluationConfig,
    *,
    seed: int = 0,
    batch_size: int = 0,
    completed: Collection[int] = (),
    base_pass: SharedBasePass | None = None,
) -> Iterator[Step]:
    """n independent edits, each from the base; probes before and after.

    `together` edits run side by side; with 0 the first case runs alone, and the size of its delta
    says how many of the others fit into `terms.budget`. Steps whose numbers are in `done` are left
    out. All edits start from one state, drawn from `seed`.

    Cost of a step: one optimisation for all its edits, one prefix per distinct question, and from
    the cut on one pass of the base per question and one of the edited model per ask.
    """
    device = _device(model)
    model = base_pass.model if base_pass else model
    state = editor.init(model, torch.Generator().manual_seed(seed))
    if batch_size:
        chunks = [slice(i, i + batch_size) for i in range(0, len(cases), batch_size)]
    else:
        chunks = [slice(0, 1)]
    number = 0
    while number < len(chunks):
        chunk = cases[chunks[number]]
        is_pending = number not in completed
        is_sizing = number == 0 and not batch_size and len(cases) > 1
        if not (is_pending or is_sizing):
            number += 1
            continue
        stopwatch = _Stopwatch(device)
        with measure_peak(device) as peak:
            first = chunks[number].start
            with _name_failing_case(model, chunk):
                _load_base_rows(base_pass, range(first, first + len(chunk)))
                with section("edit"):
                    delta = editor.edit_each(model, state, [case.edit for case in chunk])
            edit_seconds = stopwatch.lap()
            if is_sizing:
                size = _num_parallel_edits(
                    model, delta, cases, evaluation_config.memory_bytes, base_pass
                )
                chunks += [slice(i, i + size) for i in range(1, len(cases), size)]
            results = []
            if is_pending:
                evaluated = [
                    _EvaluatedCase(first + e, case, edit_index=e) for e, case in enumerate(chunk)
                ]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
        if is_pending:
            named_deltas = {f"case-{first + e:05d}": one for e, one in enumerate(unstack(delta))}
            yield Step(
                number,
                len(chunks),
                len(chunk),
                results,
                named_deltas,
                edit_seconds,
                stopwatch.lap(),
                peak.bytes,
            )
        number += 1


def run_sequential(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    evaluation_config: EvaluationConfig,
    *,
    seed: int = 0,
    sequence_length: int = 0,
    gaps: Sequence[int] = (),
    completed: Collection[int] = (),
    checkpoint: CheckpointFile | None = None,
    base_pass: SharedBasePass | None = None,
) -> Iterator[Step]:
    """Edits one after another on the same model; each group of `group` starts from the base.

    A case is probed right after its edit, `g` edits later for each g in `gaps`, and once more after
    the last edit of its group. Every edit is a step, and so is the end of a group. Edits of
    finished steps that a later step builds on are taken from `marks`; those made since the last
    mark are made again, and come out the same.
    """
    sequence_length = sequence_length or len(cases)
    starts = range(0, len(cases), sequence_length)
    num_units = len(cases) + len(starts)
    device = _device(model)
    model = base_pass.model if base_pass else model
    for group_number, start in enumerate(starts):
        members = cases[start : start + sequence_length]
        first, last = (
            start + group_number,
            start + group_number + len(members),
        )  # steps: its first edit, its end
        first_pending = next(
            (k for k in range(len(members) + 1) if first + k not in completed), None
        )
        if first_pending is None:
            continue
        state, delta, begin = editor.init(model, torch.Generator().manual_seed(seed)), None, 0
        saved = checkpoint.load(start, device) if checkpoint and first_pending else None
        if saved and saved.num_edits <= first_pending:
            begin, state, delta = saved
        for k in range(begin, len(members)):
            stopwatch = _Stopwatch(device)
            with measure_peak(device) as peak:
                with _name_failing_case(model, members[k : k + 1]):
                    _load_base_rows(base_pass, [start + k])
                    with section("edit"):
                        delta, state = editor.edit(model, state, [members[k].edit])
                edit_seconds = stopwatch.lap()
                if k < first_pending:
                    continue
                evaluated = [_EvaluatedCase(start + k, members[k])]
                evaluated += [
                    _EvaluatedCase(start + k - g, members[k - g], "after_gap", g)
                    for g in gaps
                    if g <= k
                ]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
            yield Step(
                first + k, num_units, 1, results, {}, edit_seconds, stopwatch.lap(), peak.bytes
            )
            if checkpoint:  # only now: whoever asks for more has kept the step
                checkpoint.save(start, SequenceCheckpoint(k + 1, state, delta))
        if delta is not None:
            stopwatch = _Stopwatch(device)
            with measure_peak(device) as peak:
                last_index = len(members) - 1
                evaluated = [
                    _EvaluatedCase(start + k, c, "end", last_index - k)
                    for k, c in enumerate(members)
                ]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
            named_deltas = {f"group-{group_number:04d}": delta}
            yield Step(last, num_units, 0, results, named_deltas, 0.0, stopwatch.lap(), peak.bytes)


def run_lifelong(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    evaluation_config: EvaluationConfig,
    *,
    eval_after: Sequence[int],
    max_evaluated: int = 0,
    seed: int = 0,
    completed: Collection[int] = (),
    checkpoint: CheckpointFile | None = None,
    base_pass: SharedBasePass | None = None,
) -> Iterator[Step]:
    """Edits one after another; after n of them, n in `lengths` and at the end, all n are asked.

    With `asked` at most so many of the n, evenly spread, the first and the last among them. A
    result's gap is n: `evaluated_at` "after_length" with gap 100 is the model after 100 edits, asked about these.
    Every edit is a step; steps go on from `marks` as those of `sequential` do.
    """
    device, num_units = _device(model), len(cases)
    evaluated_counts = {*eval_after, num_units}
    first_pending = next((k for k in range(num_units) if k not in completed), num_units)
    if first_pending == num_units:
        return
    model = base_pass.model if base_pass else model
    state, delta, begin = editor.init(model, torch.Generator().manual_seed(seed)), None, 0
    saved = checkpoint.load(0, device) if checkpoint and first_pending else None
    if saved and saved.num_edits <= first_pending:
        begin, state, delta = saved
    for k in range(begin, num_units):
        stopwatch = _Stopwatch(device)
        with measure_peak(device) as peak:
            with _name_failing_case(model, cases[k : k + 1]):
                _load_base_rows(base_pass, [k])
                with section("edit"):
                    delta, state = editor.edit(model, state, [cases[k].edit])
            edit_seconds = stopwatch.lap()
            if k < first_pending:
                continue
            results = []
            if k + 1 in evaluated_counts:
                chosen = _evenly_spaced(k + 1, max_evaluated)
                evaluated = [_EvaluatedCase(n, cases[n], "after_length", k + 1) for n in chosen]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
        named_deltas = {f"edits-{k + 1:05d}": delta} if k + 1 in evaluated_counts else {}
        yield Step(
            k, num_units, 1, results, named_deltas, edit_seconds, stopwatch.lap(), peak.bytes
        )
        if checkpoint:  # only now: whoever asks for more has kept the step
            checkpoint.save(0, SequenceCheckpoint(k + 1, state, delta))


def _evenly_spaced(count: int, max_count: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread; all with 0."""
    if not max_count or count <= max_count:
        return list(range(count))
    return sorted({round(k * (count - 1) / max(1, max_count - 1)) for k in range(max_count)})


def _load_base_rows(base_pass: SharedBasePass | None, numbers: Collection[int]) -> None:
    if base_pass:
        base_pass.load(numbers)


def _evaluate_cases(
    model: Model,
    delta: Delta,
    evaluated: Sequence[_EvaluatedCase],
    evaluation_config: EvaluationConfig,
    base_pass: SharedBasePass | None,
) -> list[Result]:
    """All probes of these cases, in order: case, probe, index, scorer."""
    edited_model, depth = bind(model, delta), delta_depth(model, delta)
    pairs: list[tuple[tuple[_EvaluatedCase, str, int, Query], ProbeResult]] = []
    numbers = [one.case_number for one in evaluated]
    for span in base_pass.block_slices(numbers) if base_pass else [slice(None)]:
        labeled_queries = [
            (one, *probe) for one in evaluated[span] for probe in questions_of(one.case)
        ]
        questions = [
            ProbeQuestion(probe, query, one.edit_index) for one, probe, _, query in labeled_queries
        ]
        with _name_failing_case(model, [one.case for one in evaluated[span]]):
            _load_base_rows(base_pass, numbers[span])
            pairs += zip(
                labeled_queries, evaluate(model, edited_model, questions, depth, evaluation_config)
            )
    return [
        Result(
            one.case_number,
            one.case,
            probe,
            index,
            query,
            one.evaluated_at,
            one.gap,
            scorer,
            *got.scores[scorer],
            got.before,
            got.after,
            got.kl,
            got.generation_unchanged,
            got.ppl_r,
        )
        for (one, probe, index, query), got in pairs
        for scorer in got.scores
    ]


def delta_depth(model: Model, delta: Delta) -> prefix.EditDepth:
    """The lowest place a delta acts on."""
    acts_on = {entry.acts_on() for entry in delta.header.entries}
    if "prompt" in acts_on:
        return prefix.EditDepth(before_decoder=True)
    if "embeddings" in acts_on:
        return prefix.EditDepth()
    depth = prefix.edit_depth(model.card, [entry.name for entry in delta.header.entries])
    needs_all_tokens = any(entry.needs_all_tokens() for entry in delta.header.entries)
    return depth._replace(scored_only=depth.scored_only and not needs_all_tokens)


def _num_parallel_edits(
    model: Model,
    delta: Delta,
    cases: Sequence[Case],
    memory_bytes: int,
    base_pass: SharedBasePass | None,
) -> int:
    """How many edits like this one may run side by side: its optimiser, and what autograd keeps."""
    card, depth = model.card, delta_depth(model, delta)
    delta_bytes = (
        sum(t.numel() * t.element_size() for t in delta.tensors.values()) // delta.header.stack
    )
    longest = max(cases, key=lambda case: len(case.edit.prompt) + len(case.edit.target)).edit
    with _name_failing_case(model, cases):
        inputs = model.preprocess([longest])
    scored, tokens = inputs.labels.shape[1], inputs.input_ids.shape[1]
    num_kept_tokens = scored if depth.scored_only else tokens
    layers = max(1, card.num_layers - depth.layer)
    graph_bytes = 4 * (
        ACTIVATIONS_PER_TOKEN * layers * num_kept_tokens * card.hidden_size
        + 3 * scored * card.vocab_size
    )
    bytes_per_edit = OPTIMIZER_COPIES * delta_bytes + graph_bytes + row_num_bytes(model, tokens)
    bytes_per_edit += base_pass.bytes_per_case if base_pass else 0
    return max(1, min(MAX_PARALLEL_EDITS, memory_bytes // bytes_per_edit))


def _device(model: Model) -> torch.device:
    return next(iter(model.params.values())).device


@contextlib.contextmanager
def _name_failing_case(model: Model, cases: Sequence[Case]) -> Iterator[None]:
    """Say which case a fault is about: the first whose questions can not be read, else all."""
    try:
        yield
    except ErrataError as fault:
        for case in cases:
            try:
                model.preprocess([query for _, _, query in questions_of(case)])
            except ErrataError as own:
                raise type(own)(f"case {case.id!r}: {own}") from own
        if len(cases) == 1:
            raise type(fault)(f"case {cases[0].id!r}: {fault}") from fault
        raise
