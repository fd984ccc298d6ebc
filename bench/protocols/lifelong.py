"""Edits in sequence, evaluated after 1, 10, 100, 1000."""

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

__all__ = ["run_lifelong"]


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
    """Edit in sequence; after n edits, n in `eval_after` and at the end, evaluate all n.

    A result's gap is n: `evaluated_at` "after_length" with gap 100 is the model after 100 edits,
    evaluated on these. Every edit is a step; steps resume as those of `sequential` do.

    Args:
        model: The base.
        editor: The editor.
        cases: Cases, in the order of the edits.
        evaluation_config: Scorers, generation and memory.
        eval_after: Numbers of edits to evaluate after.
        max_evaluated: Cases evaluated at a time, evenly spread from the first to the last. 0: all.
        seed: Seed of the editor's state.
        completed: Numbers of the steps that are stored already.
        checkpoint: File of the sequence's state.
        base_pass: Shared answers of the base.

    Yields:
        Finished steps.
    """
    device, num_cases = _device(model), len(cases)
    evaluated_counts = {*eval_after, num_cases}
    first_pending = next((k for k in range(num_cases) if k not in completed), num_cases)
    if first_pending == num_cases:
        return
    model = base_pass.model if base_pass else model
    state, delta, begin = editor.init(model, torch.Generator().manual_seed(seed)), None, 0
    saved = checkpoint.load(0, state, device) if checkpoint and first_pending else None
    if saved and saved.num_edits <= first_pending:
        begin, state, delta = saved
    for k in range(begin, num_cases):
        stopwatch = _Stopwatch(device)
        with measure_peak(device) as peak:
            with _name_failing_case(model, cases[k : k + 1]):
                _load_base_rows(base_pass, [k])
                with section("edit"):
                    delta, state, fault = _edit_next(editor, model, state, cases[k], delta)
            edit_seconds = stopwatch.lap()
            if k < first_pending:
                continue
            results = []
            if k + 1 in evaluated_counts:
                chosen = _evenly_spaced(k + 1, max_evaluated)
                evaluated = [
                    _EvaluatedCase(
                        n, cases[n], "after_length", k + 1, fault=fault if n == k else ""
                    )
                    for n in chosen
                ]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
        named_deltas = {}
        if delta is not None and k + 1 in evaluated_counts:
            named_deltas[f"edits-{k + 1:05d}"] = delta
        yield Step((k,), 1, results, named_deltas, edit_seconds, stopwatch.lap(), peak.bytes)
        if checkpoint and delta:  # only now: a caller that asks for more has stored the step
            checkpoint.save(0, SequenceCheckpoint(k + 1, state, delta))


def _evenly_spaced(count: int, max_count: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread; all with 0."""
    if not max_count or count <= max_count:
        return list(range(count))
    return sorted({round(k * (count - 1) / max(1, max_count - 1)) for k in range(max_count)})
