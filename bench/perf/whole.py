"""The same editors without what makes them cheap: whole forwards of one row at a time.

`plain.py` edits Hugging Face modules in place as the field's code bases do, for FT and LoRA. Here a
model is made to run every row from its pixels whenever it is decoded, from whatever depth: each
step of an edit, each probe, before and after, is a whole forward, as it is there. The arithmetic
of the editors is untouched, so answers must be equal, and what is timed is the cutting.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from errata.functional import Batch, Case, Editor, Inputs, Model, Query, bind
from errata.functional.errors import ModelUnsupported
from errata.functional.types import IGNORE

__all__ = ["single", "whole"]

_SOURCE = "source@b"  # an extra that no layer is handed: which rows a batch came from


def whole(model: Model) -> Model:
    """The model, every decode of which begins at the pixels; nothing is thinned or cut in time."""
    sources: dict[int, Inputs] = {}
    numbers = itertools.count()

    def embed(params, inputs, rewrites=None, edit=None) -> Batch:
        batch = model.embed(params, inputs, rewrites or {}, edit=edit)
        number = next(numbers)
        sources[number] = inputs
        if len(sources) > 64:
            del sources[min(sources)]
        mark = torch.full_like(batch.edit, number)
        return batch._replace(extras={**batch.extras, _SOURCE: mark})

    def decode(params, batch: Batch, rewrites=None, *, keep=False, past=None, **options) -> Any:
        if past is not None or keep:
            raise ModelUnsupported("whole forwards keep no keys and values.")
        mark = batch.extras.get(_SOURCE)
        if mark is not None and int(mark[0]) in sources and batch.depth:
            with torch.no_grad():
                again = model.embed(model.params, sources[int(mark[0])])
                again = model.decode(model.params, again, stop=batch.depth)
            if again.hidden.shape == batch.hidden.shape:
                batch = batch._replace(hidden=again.hidden)
        result = model.decode(params, batch, rewrites or {}, **options)
        if isinstance(result, Batch) and (rewrites or params is not model.params):
            extras = {key: value for key, value in result.extras.items() if key != _SOURCE}
            result = result._replace(extras=extras)  # no longer what the base makes of the pixels
        return result

    def thin(params, batch: Batch, rewrites=None, **options) -> Batch:
        return batch

    return model._replace(embed=embed, decode=decode, thin=thin, known=None)


def single(
    model: Model, editor: Editor, cases: Sequence[Case], queries
) -> list[dict[tuple[str, int], tuple[str, str]]]:
    """Texts before and after each edit, per probe: batches of one, nothing shared."""
    slow = whole(model)
    state = editor.init(slow, torch.Generator().manual_seed(0))
    found = []
    for case in cases:
        asked = {(name, index): query for name, index, query in queries(case)}
        before = {key: _say(slow, query) for key, query in asked.items()}
        delta = editor.each(slow, state, [case.edit])
        edited = bind(slow, delta)
        after = {key: _say(edited, query) for key, query in asked.items()}
        found.append({key: (before[key], after[key]) for key in asked})
    return found


def _say(model: Model, query: Query) -> str:
    inputs = model.read([query], edit=torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        batch = model.embed(model.params, inputs, edit=torch.zeros(1, dtype=torch.int64))
        logits = model.decode(model.params, batch)
    ids = logits[0].argmax(-1)
    return model.write(ids[inputs.labels[0] != IGNORE].tolist()).strip()
