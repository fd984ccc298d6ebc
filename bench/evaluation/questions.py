"""Which questions a case asks; `ProbeQuestion`, `ProbeResult`, `EvaluationConfig`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from errata.bench.storage.results_log import ProbeAnswer
from errata.functional import Case, Model, Query
from errata.functional.errors import ErrataError, InvalidInputError, join_messages
from errata.functional.hashing import content_id
from errata.functional.metrics.conventions import Scorer

__all__ = [
    "EvaluationConfig",
    "ProbeQuestion",
    "ProbeResult",
    "find_unreadable",
    "query_key",
    "questions_of",
    "validate_cases",
]


class ProbeQuestion(NamedTuple):
    """One question to one edit."""

    probe: str
    query: Query
    edit_index: int = 0  # number in the stacked delta; 0 where only one edit is bound


class EvaluationConfig(NamedTuple):
    """How answers are measured."""

    scorers: tuple[Scorer, ...]
    max_new_tokens: int = 0  # tokens of free generation; 0: none
    generate_probes: Literal["all", "success"] = "all"  # probe, or all but localities
    ppl_r_tokens: int = 0  # tokens generated after the edit's target; 0: no PPL_r
    memory_bytes: int = 1 << 30  # bytes a batch may take in addition to the model

    @property
    def num_ranks(self) -> int:
        return max(one.num_ranks for one in self.scorers)

    @property
    def needs_all_positions(self) -> bool:
        return any(one.needs_all_positions for one in self.scorers)


class ProbeResult(NamedTuple):
    """What came of one ask: both answers, and (base success, score) by scorer name."""

    before: ProbeAnswer
    after: ProbeAnswer
    scores: dict[str, tuple[float | None, float | None]]
    kl: float | None = None  # KL(base || edited) at the answer, nats per token
    generation_unchanged: bool | None = None  # localities: both say the same when left to talk
    ppl_r: float | None = None  # of edits


def query_key(query: Query) -> tuple:
    """The identity of a question: prompt, target, and the content of its images.

    Args:
        query: The question.

    Returns:
        A hashable key.
    """
    return query.prompt, query.target, tuple(map(content_id, query.images)), query.video


@contextlib.contextmanager
def _name_failing_case(model: Model, cases: Sequence[Case]) -> Iterator[None]:
    """Say which case a fault is about: the first whose questions cannot be read, else all."""
    try:
        yield
    except ErrataError as fault:
        for case in cases:
            try:
                model.preprocess([query for _, _, query in questions_of(case)])
            except ErrataError as own:
                raise type(own)(f"case {case.id!r}: {own}") from own
        if len(cases) == 1 and not str(fault).startswith("case '"):
            raise type(fault)(f"case {cases[0].id!r}: {fault}") from fault
        raise


def questions_of(case: Case) -> list[tuple[str, int, Query]]:
    """The questions of a case, in the order of its rows.

    `reliability` is the edit itself where the case has no other.

    Args:
        case: The case.

    Returns:
        (probe, index, query) of each.
    """
    probes = {"reliability": (case.edit,), **case.probes}
    return [(name, i, query) for name, asked in probes.items() for i, query in enumerate(asked)]


def validate_cases(cases: Sequence[Case], *, allow_unreadable: bool = False) -> None:
    """Refuse cases that cannot be edited or scored, all of them at once, before any work.

    Args:
        cases: The cases.
        allow_unreadable: Whether cases without a target are left to `find_unreadable`.

    Raises:
        InvalidInputError: Names every one of them.
    """
    faults = []
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            faults.append(f"case {case.id!r} comes twice")
        seen.add(case.id)
        for probe, index, query in questions_of(case):
            if not query.target.strip() and not allow_unreadable:
                faults.append(f"case {case.id!r}, {probe}[{index}]: the target is empty")
    if faults:
        raise InvalidInputError(
            f"every query must have a target and every case a name: {join_messages(faults)}."
        )


def find_unreadable(model: Model, cases: Sequence[Case]) -> dict[str, str]:
    """Read every query of every case, and collect what the model cannot read.

    Args:
        model: The model.
        cases: The cases.

    Returns:
        The first fault of each unreadable case, by its id, naming probe and image.
    """
    faults = {}
    for case in cases:
        for probe, index, query in [("edit", 0, case.edit), *questions_of(case)]:
            try:
                if not query.target.strip():
                    raise InvalidInputError("the target is empty.")
                model.preprocess([query])
            except ErrataError as fault:
                faults[case.id] = f"case {case.id!r}, {probe}[{index}]: {fault}"
                break
    return faults
