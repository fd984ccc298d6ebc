"""The same editors without what makes them cheap: whole forwards of one row at a time.

`plain_baseline.py` edits Hugging Face modules in place as the field's code bases do, for FT and
LoRA. Here every decode of a model runs its rows from the pixels: each step of an edit, each probe,
before and after, is a whole forward, as it is there. The arithmetic of the editors is untouched, so
answers must be equal, and what is timed is the cutting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from errata.functional import Batch, Case, Editor, Inputs, Model, Query, bind
from errata.functional.errors import UnsupportedModelError
from errata.functional.types import IGNORE_INDEX

__all__ = ["run_single", "without_prefix_reuse"]

_SOURCE = "source@b"  # an extra that no layer is handed: which rows a batch came from


def without_prefix_reuse(model: Model) -> Model:
    """Make every decode of a model start at the pixels, without prefixes, scored rows or caches.

    Args:
        model: The model.

    Returns:
        An equivalent model.
    """
    sources: dict[int, Inputs] = {}
    numbers = itertools.count()

    def embed(params, inputs, hooks=None, edit_index=None) -> Batch:
        batch = model.embed(params, inputs, hooks or {}, edit_index=edit_index)
        number = next(numbers)
        sources[number] = inputs
        if len(sources) > 64:
            del sources[min(sources)]
        mark = torch.full_like(batch.edit_index, number)
        return batch._replace(layer_inputs={**batch.layer_inputs, _SOURCE: mark})

    def decode(
        params, batch: Batch, hooks=None, *, return_cache=False, kv_cache=None, **options
    ) -> Any:
        if kv_cache is not None or return_cache:
            raise UnsupportedModelError("whole forwards keep no keys and values.")
        mark = batch.layer_inputs.get(_SOURCE)
        if mark is not None and int(mark[0]) in sources and batch.depth:
            with torch.no_grad():
                again = model.embed(model.params, sources[int(mark[0])])
                again = model.decode(model.params, again, stop=batch.depth)
            if again.hidden_states.shape == batch.hidden_states.shape:
                batch = batch._replace(hidden_states=again.hidden_states)
        result = model.decode(params, batch, hooks or {}, **options)
        if isinstance(result, Batch) and (hooks or params is not model.params):
            layer_inputs = {
                key: value for key, value in result.layer_inputs.items() if key != _SOURCE
            }
            result = result._replace(
                layer_inputs=layer_inputs
            )  # no longer what the base makes of the pixels
        return result

    def select_scored(params, batch: Batch, hooks=None, **options) -> Batch:
        return batch

    return model._replace(
        embed=embed, decode=decode, select_scored=select_scored, prefix_cache=None
    )


def run_single(
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    questions_of: Callable[[Case], list[tuple[str, int, Query]]],
) -> list[dict[tuple[str, int], tuple[str, str]]]:
    """The single protocol in batches of one, nothing shared: texts before and after, per probe.

    Args:
        model: The model.
        editor: The editor.
        cases: Cases.
        questions_of: Lists the questions of a case.

    Returns:
        Texts by probe and index, for each case.
    """
    whole_model = without_prefix_reuse(model)
    state = editor.init(whole_model, torch.Generator().manual_seed(0))
    results = []
    for case in cases:
        questions = {(name, index): query for name, index, query in questions_of(case)}
        before = {key: _answer_text(whole_model, query) for key, query in questions.items()}
        delta = editor.edit_each(whole_model, state, [case.edit])
        edited = bind(whole_model, delta)
        after = {key: _answer_text(edited, query) for key, query in questions.items()}
        results.append({key: (before[key], after[key]) for key in questions})
    return results


def _answer_text(model: Model, query: Query) -> str:
    inputs = model.preprocess([query], edit_index=torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        batch = model.embed(model.params, inputs, edit_index=torch.zeros(1, dtype=torch.int64))
        logits = model.decode(model.params, batch)
    ids = logits[0].argmax(-1)
    return model.detokenize(ids[inputs.labels[0] != IGNORE_INDEX].tolist()).strip()
