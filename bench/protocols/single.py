"""Independent edits side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from errata.bench.evaluation.base_pass import SharedBasePass
from errata.bench.evaluation.batching import row_num_bytes
from errata.bench.evaluation.memory import measure_peak
from errata.bench.evaluation.profiling import section
from errata.bench.evaluation.questions import EvaluationConfig, _name_failing_case
from errata.bench.protocols.base import (
    Step,
    _device,
    _evaluate_cases,
    _EvaluatedCase,
    _load_base_rows,
    _Stopwatch,
)
from errata.bench.storage.checkpoint import CheckpointFile
from errata.functional import Case, Delta, Editor, Model
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import EditDivergedError
from errata.functional.forward.prefix import delta_depth
from errata.functional.types import State

__all__ = ["run_single"]

MAX_PARALLEL_EDITS = 64  # side by side, whatever the budget
OPTIMIZER_COPIES = 5  # a delta, its gradient, two moments, and the copy it is written to
ACTIVATIONS_PER_TOKEN = 34  # values of model width per token that autograd keeps of a layer


def run_single(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    evaluation_config: EvaluationConfig,
    *,
    seed: int = 0,
    batch_size: int = 0,
    completed: Collection[int] = (),
    checkpoint: CheckpointFile | None = None,
    base_pass: SharedBasePass | None = None,
) -> Iterator[Step]:
    """Make n independent edits, each from the base, and evaluate before and after.

    All edits start from one state. Cost of a step: one optimisation for all its edits, one prefix
    per distinct question, and from the cut on one pass of the base per question and one of the
    edited model per question and edit.

    Args:
        model: The base.
        editor: The editor.
        cases: Cases.
        evaluation_config: Scorers, generation and memory.
        seed: Seed of the editor's state.
        batch_size: Edits made together. 0: the first alone, then as many as its delta's size
            allows.
        completed: Numbers of the cases that are stored already.
        checkpoint: Not used: independent edits have no state to resume.
        base_pass: Shared answers of the base.

    Yields:
        Finished steps.
    """
    device = _device(model)
    model = base_pass.model if base_pass else model
    state = editor.init(model, torch.Generator().manual_seed(seed))
    pending = [n for n in range(len(cases)) if n not in completed]
    if not pending:
        return
    size = batch_size
    if not size:  # the first case alone says how many fit; its edit is made again on resuming
        chunks = [[0]] if len(cases) > 1 or 0 in pending else []
    else:
        chunks = _chunks(pending, size)
    while chunks:
        numbers = chunks.pop(0)
        chunk = [cases[n] for n in numbers]
        is_pending = numbers[0] in pending
        stopwatch = _Stopwatch(device)
        with measure_peak(device) as peak:
            with _name_failing_case(model, chunk):
                _load_base_rows(base_pass, numbers)
                with section("edit"):
                    delta, indices, faults = _edit_each(editor, model, state, chunk)
            edit_seconds = stopwatch.lap()
            if not size:
                size = (
                    _num_parallel_edits(
                        model, delta, cases, evaluation_config.memory_bytes, base_pass
                    )
                    if delta
                    else MAX_PARALLEL_EDITS
                )
                chunks = _chunks([n for n in pending if n > 0], size)
            results = []
            if is_pending:
                evaluated = [
                    _EvaluatedCase(n, case, edit_index=indices.get(e, -1), fault=faults.get(e, ""))
                    for e, (n, case) in enumerate(zip(numbers, chunk))
                ]
                results = _evaluate_cases(model, delta, evaluated, evaluation_config, base_pass)
        if is_pending:
            deltas = unstack(delta) if delta else []
            named_deltas = {f"case-{numbers[e]:05d}": deltas[row] for e, row in indices.items()}
            yield Step(
                tuple(numbers),
                len(chunk),
                results,
                named_deltas,
                edit_seconds,
                stopwatch.lap(),
                peak.bytes,
            )


def _edit_each(
    editor: Editor, model: Model, state: State, chunk: Sequence[Case]
) -> tuple[Delta | None, dict[int, int], dict[int, str]]:
    """Edit all cases that do not diverge: their delta, its edit of each, and why others failed."""
    left, faults = list(range(len(chunk))), {}
    while left:
        try:
            delta = editor.edit_each(model, state, [chunk[e].edit for e in left])
            return delta, {e: row for row, e in enumerate(left)}, faults
        except EditDivergedError as error:
            diverged = [left[row] for row in error.edits if row < len(left)] or left
            faults |= dict.fromkeys(diverged, str(error))
            left = [e for e in left if e not in diverged]
    return None, {}, faults


def _chunks(numbers: Sequence[int], size: int) -> list[list[int]]:
    return [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]


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
