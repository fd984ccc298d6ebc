"""The functions of a bound model: the base's, with a delta's rewrites, each row under its edit.

Where a stacked change can not be written as a rewrite, the rows of each edit run apart, through the
model bound to that edit alone. That reads the edit numbers, so it does not work under `vmap`; a
caller's rewrites then see the rows of one edit at a time, edits in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import compose
from .errors import BadInput
from .rows import concat, take
from .types import Batch, Inputs, Model, Params, Past, Rewrites

__all__ = ["Plan", "functions"]


NONE: Rewrites = MappingProxyType({})


class Plan(NamedTuple):
    """How a delta acts on the functions of a model, in the decoder and before it."""

    rewrites: Sequence[Callable[[Batch], Rewrites]] = ()
    below: Rewrites = {}
    apart: bool = False  # decode edit by edit
    apart_below: bool = False  # embed edit by edit
    apart_tokens: bool = False  # embed new tokens edit by edit
    alone: Callable[[Params, int], Model] | None = None  # (params, edit) -> bound to that edit


def functions(model: Model, plan: Plan) -> dict[str, Any]:
    """embed, decode, thin and extend of `model` under a plan."""

    def at(batch: Batch, more: Rewrites) -> Rewrites:
        return compose(*(make(batch) for make in plan.rewrites), more)

    def embed(
        params: Params, inputs: Inputs, rewrites: Rewrites = NONE, edit: Tensor | None = None
    ):
        if plan.apart_below:
            return _embed_apart(model, plan, params, inputs, rewrites, edit)
        return model.embed(params, inputs, compose(plan.below, rewrites), edit=edit)

    def decode(params: Params, batch: Batch, rewrites: Rewrites = NONE, **options):
        if plan.apart:

            def run(one: Model, part: Batch, rows: Tensor):
                return one.decode(one.params, part, rewrites, **_option_rows(options, rows))

            return _apart(model, plan, params, batch, run)
        given, batch = batch.notes, batch._replace(notes=dict(batch.notes))
        found = model.decode(params, batch, at(batch, rewrites), **options)
        return _noted(found, given, batch.notes)

    def thin(params: Params, batch: Batch, rewrites: Rewrites = NONE, **options):
        if plan.apart:

            def run(one: Model, part: Batch, rows: Tensor):
                return one.thin(one.params, part, rewrites, **_option_rows(options, rows))

            thinned = _apart(model, plan, params, batch, run, alike=True)
            return batch if thinned is None else thinned
        given, batch = batch.notes, batch._replace(notes=dict(batch.notes))
        return _noted(model.thin(params, batch, at(batch, rewrites), **options), given, batch.notes)

    def extend(
        params: Params,
        ids: Tensor,
        past: Past,
        rewrites: Rewrites = NONE,
        edit: Tensor | None = None,
    ):
        if not plan.apart_tokens:
            return model.extend(params, ids, past, rewrites, edit=edit)
        edit = _needed(edit)
        groups, parts = _grouped(edit), []
        for number, rows in groups:
            one, mine = _one(model, plan, params, number), _past_rows(past, rows)
            parts.append(one.extend(one.params, ids[rows], mine, rewrites, edit=edit[rows]))
        return _joined(parts, groups)

    return {"embed": embed, "decode": decode, "thin": thin, "extend": extend}


def _noted(result: Any, given: Mapping[str, Tensor], notes: Mapping[str, Tensor]) -> Any:
    """A result with what this run has noted: where deltas lie on one another each has a dict.

    What was given and stays as it was is left out: a delta below may have noted something newer.
    """
    if isinstance(result, Batch | Past):
        own = {name: note for name, note in notes.items() if given.get(name) is not note}
        return result._replace(notes={**result.notes, **own})
    if isinstance(result, tuple):
        return tuple(_noted(part, given, notes) for part in result)
    return result


def _apart(
    model: Model, plan: Plan, params: Params, batch: Batch, run, *, alike: bool = False
) -> Any:
    """What each edit's rows become; with `alike` None where only some of them are thinned.

    Rows that keep all their tokens can not stand in one batch with rows that do not.
    """
    groups = _grouped(batch.edit)
    parts = [run(_one(model, plan, params, n), take(batch, rows), rows) for n, rows in groups]
    if alike and len({frozenset(part.extras) for part in parts}) > 1:
        return None
    return _joined(parts, groups)


def _embed_apart(model, plan: Plan, params, inputs: Inputs, rewrites, edit: Tensor | None) -> Batch:
    # Pixels have no row axis in every family, so each edit embeds all rows and keeps its own.
    edit = _needed(edit)
    groups, parts = _grouped(edit), []
    for number, rows in groups:
        one = _one(model, plan, params, number)
        parts.append(take(one.embed(one.params, inputs, rewrites, edit=edit), rows))
    return _joined(parts, groups)


def _one(model: Model, plan: Plan, params: Params, number: int) -> Model:
    base = model._replace(params=params)
    assert plan.alone is not None
    return base if number < 0 else plan.alone(params, number)


def _needed(edit: Tensor | None) -> Tensor:
    if edit is None:
        raise BadInput(
            "a stacked delta that changes what runs before the decoder needs each row's edit "
            "there: pass edit=[B] to `embed` (and to `extend`)."
        )
    return edit


def _grouped(edit: Tensor) -> list[tuple[int, Tensor]]:
    """(edit number, its rows) for every edit that occurs, in ascending order."""
    numbers = sorted(set(edit.tolist()))
    return [(number, (edit == number).nonzero()[:, 0]) for number in numbers]


def _joined(parts: list[Any], groups: list[tuple[int, Tensor]]) -> Any:
    """The results of groups of rows as one, in the order of the rows."""
    back = torch.cat([rows for _, rows in groups]).argsort()
    sizes = [len(rows) for _, rows in groups]
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[back]
    if isinstance(first, Batch):
        notes = _notes([part.notes for part in parts], sizes, back)
        return take(concat(parts), back)._replace(notes=notes)
    if isinstance(first, Past):
        layers = range(len(first.keys))
        return Past(
            tuple(torch.cat([part.keys[n] for part in parts])[back] for n in layers),
            tuple(torch.cat([part.values[n] for part in parts])[back] for n in layers),
            torch.cat([part.mask for part in parts])[back],
            torch.cat([part.next for part in parts])[back],
            _notes([part.notes for part in parts], sizes, back),
        )
    return tuple(_joined([part[n] for part in parts], groups) for n in range(len(first)))


def _notes(parts: list[Mapping[str, Tensor]], sizes: list[int], back: Tensor) -> dict[str, Tensor]:
    """The notes of all groups; zeros for rows whose edit has none of a name, and reads none.

    A note may grow with its row. Rows whose edit does not know it carry it as it was: shorter than
    the others', and zeros just as well.
    """
    joined = {}
    for name in sorted({name for part in parts for name in part}):
        have = [part[name] for part in parts if name in part]
        like = max(have, key=lambda note: note[:1].numel())
        mine = [
            part[name]
            if name in part and part[name].shape[1:] == like.shape[1:]
            else like.new_zeros(size, *like.shape[1:])
            for part, size in zip(parts, sizes)
        ]
        joined[name] = torch.cat(mine)[back]
    return joined


def _past_rows(past: Past, rows: Tensor) -> Past:
    return Past(
        tuple(key[rows] for key in past.keys),
        tuple(value[rows] for value in past.values),
        past.mask[rows],
        past.next[rows],
        {name: note[rows] for name, note in past.notes.items()},
    )


def _option_rows(options: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Options of `decode` that lead with rows, cut to those of one edit."""
    cut = dict(options)
    if isinstance(cut.get("at"), Tensor):
        cut["at"] = cut["at"][rows]
    if cut.get("past") is not None:
        cut["past"] = _past_rows(cut["past"], rows)
    return cut
