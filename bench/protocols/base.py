"""The ways to put an editor to the test, as streams of measured steps.

    single      n independent edits, each from the base, run side by side
    sequential  n edits one after another, the base back before each group
    lifelong    n edits one after another; after 1, 10, 100, ... all edits so far are asked

All are generators over *steps*. What a step holds is decided by the arguments alone, never by what
was measured on the way, so that a run that was killed can leave out finished steps and end with the
same rows.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch

from errata.bench.evaluation.base_pass import SharedBasePass
from errata.bench.evaluation.evaluator import evaluate
from errata.bench.evaluation.questions import (
    EvaluationConfig,
    ProbeQuestion,
    ProbeResult,
    _name_failing_case,
    questions_of,
)
from errata.bench.storage.results_log import ProbeAnswer
from errata.functional import Case, Delta, Editor, Model, Query
from errata.functional.binding.bound_model import bind
from errata.functional.errors import EditDivergedError
from errata.functional.forward.prefix import EditDepth, delta_depth
from errata.functional.types import State

__all__ = ["Result", "Step"]

EvaluatedAt = Literal["after_edit", "after_gap", "end", "after_length"]


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
    fault: str = ""  # why the edit was not made; the answers are then the base's


class Step(NamedTuple):
    """What is finished together: results, the deltas that were made, and what it cost."""

    units: tuple[int, ...]  # numbers in the leg, see `bench.runs.identity.unit_states`
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
    fault: str = ""  # why its edit was not made


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


def _edit_next(
    editor: Editor, model: Model, state: State, case: Case, delta: Delta | None
) -> tuple[Delta | None, State, str]:
    """The next edit of a sequence; one that diverges leaves the sequence as it was."""
    try:
        return (*editor.edit(model, state, [case.edit]), "")
    except EditDivergedError as error:
        return delta, state, str(error)


def _load_base_rows(base_pass: SharedBasePass | None, numbers: Collection[int]) -> None:
    if base_pass:
        base_pass.load(numbers)


def _evaluate_cases(
    model: Model,
    delta: Delta | None,
    evaluated: Sequence[_EvaluatedCase],
    evaluation_config: EvaluationConfig,
    base_pass: SharedBasePass | None,
) -> list[Result]:
    """All probes of these cases, in order: case, probe, index, scorer. No delta: the base's."""
    edited_model = model if delta is None else bind(model, delta)
    depth = EditDepth() if delta is None else delta_depth(model, delta)
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
            one.fault,
        )
        for (one, probe, index, query), got in pairs
        for scorer in got.scores
    ]


def _device(model: Model) -> torch.device:
    return next(iter(model.params.values())).device
