"""Edits in sequence, with gaps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from errata.bench.evaluation.base_pass import SharedBasePass
from errata.bench.evaluation.memory import measure_peak
from errata.bench.evaluation.profiling import section
from errata.bench.evaluation.questions import EvaluationConfig, _name_failing_case
from errata.bench.protocols.base import (
    Step,
    _device,
    _edit_next,
    _evaluate_cases,
    _EvaluatedCase,
    _load_base_rows,
    _Stopwatch,
)
from errata.bench.storage.checkpoint import CheckpointFile, SequenceCheckpoint
from errata.functional import Case, Editor, Model

__all__ = ["run_sequential"]


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
    """Edit one model in sequence; each group of `sequence_length` edits starts from the base.

    A case is evaluated right after its edit, g edits later for each g in `gaps`, and once more
    after the last edit of its group. Every edit is a step, and so is the end of a group. Edits of
    completed steps that a later step builds on are read from the checkpoint; those made since the
    checkpoint are made again, with the same result.

    Args:
        model: The base.
        editor: The editor.
        cases: Cases, in the order of the edits.
        evaluation_config: Scorers, generation and memory.
        seed: Seed of the editor's state.
        sequence_length: Edits per group. 0: all in one.
        gaps: Edits after which a case is evaluated again.
        completed: Numbers of the steps that are stored already.
        checkpoint: File of the sequence's state.
        base_pass: Shared answers of the base.

    Yields:
        Finished steps.
    """
    sequence_length = sequence_length or len(cases)
    starts = range(0, len(cases), sequence_length)
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
        saved = checkpoint.load(start, state, device) if checkpoint and first_pending else None
        if saved and saved.num_edits <= first_pending:
            begin, state, delta = saved
        for k in range(begin, len(members)):
            stopwatch = _Stopwatch(device)
            with measure_peak(device) as peak:
                with _name_failing_case(model, members[k : k + 1]):
                    _load_base_rows(base_pass, [start + k])
                    with section("edit"):
                        delta, state, fault = _edit_next(editor, model, state, members[k], delta)
                edit_seconds = stopwatch.lap()
                if k < first_pending:
                    continue
                evaluated = [_EvaluatedCase(start + k, members[k], fault=fault)]
                evaluated += [
                    _EvaluatedCase(start + k - g, members[k - g], "after_gap", g)
                    for g in gaps
                    if g <= k
                ]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
            yield Step((first + k,), 1, results, {}, edit_seconds, stopwatch.lap(), peak.bytes)
            if checkpoint and delta:  # only now: a caller that asks for more has stored the step
                checkpoint.save(start, SequenceCheckpoint(k + 1, state, delta))
        if delta is not None or begin < len(members):
            stopwatch = _Stopwatch(device)
            with measure_peak(device) as peak:
                last_index = len(members) - 1
                evaluated = [
                    _EvaluatedCase(start + k, c, "end", last_index - k)
                    for k, c in enumerate(members)
                ]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
            named_deltas = {f"group-{group_number:04d}": delta} if delta else {}
            yield Step((last,), 0, results, named_deltas, 0.0, stopwatch.lap(), peak.bytes)
