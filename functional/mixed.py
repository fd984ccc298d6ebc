"""One batch whose rows carry different deltas."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from .bind import bind
from .bound import Plan, functions
from .errors import BadInput, KindUnsupported, ShapeMismatch
from .header import EditRecord, LowRank
from .kinds import Part, parts
from .merge import same_base
from .prompts import asked
from .types import Batch, Delta, Inputs, Model, Params, Query, Rewrites

__all__ = ["bind_rows", "padded_stack"]


def bind_rows(model: Model, deltas: Sequence[Delta], rows: Sequence[int] | Tensor) -> Model:
    """The model with row b of a batch edited by `deltas[rows[b]]`, or not at all where that is -1.

    Batches must have as many rows as `rows`; `generate` keeps them in order:

        generate(bind_rows(model, [cat, dog], [0, 1, -1]), three_queries)

    Low-rank deltas, of whatever ranks and parameters, run as one grouped product, in fp32 and
    rounded once whatever their form; with any other kind among them the rows of each delta run
    apart, each in its own form. Raises what `bind` raises, BadInput for rows that name no delta,
    KindUnsupported for deltas that are stacked already.
    """
    rows = torch.as_tensor(rows, dtype=torch.long)
    if not deltas or rows.ndim != 1 or bool(((rows < -1) | (rows >= len(deltas))).any()):
        raise BadInput(
            f"each row must name one of {len(deltas)} delta(s) by number, or -1 for none, got "
            f"{rows.flatten()[:12].tolist()}."
        )
    if any(delta.header.stack for delta in deltas):
        raise KindUnsupported(
            "a stacked delta names its rows itself: `unstack` it for `bind_rows`."
        )
    same_base(deltas)
    if all(isinstance(entry, LowRank) for delta in deltas for entry in delta.header.entries):
        bound = bind(model, padded_stack(deltas))
    else:
        bound = _apart(model, deltas, rows)

    def embed(
        params: Params,
        inputs: Inputs,
        rewrites: Rewrites | None = None,
        edit: Tensor | None = None,
    ) -> Batch:
        if edit is None and len(inputs.ids) != len(rows):
            raise ShapeMismatch(
                f"the batch must have a row for each of the {len(rows)} numbers given to "
                f"`bind_rows`, has {len(inputs.ids)}."
            )
        here = rows.to(inputs.ids.device) if edit is None else edit
        return bound.embed(params, inputs, rewrites or {}, edit=here)

    return bound._replace(embed=embed, deltas=(*model.deltas, *deltas))


def padded_stack(deltas: Sequence[Delta]) -> Delta:
    """Low-rank deltas side by side: ranks padded with zeros, absent parameters zero altogether."""
    found = [parts(delta) for delta in deltas]
    entries, tensors = [], {}
    for key in sorted({key for mine in found for key in mine}):
        given = [mine.get(key) for mine in found]
        have = [part for part in given if part is not None]
        first = have[0].entry
        if any(
            (p.entry.shape, p.entry.transposed) != (first.shape, first.transposed) for p in have
        ):
            raise ShapeMismatch(f"{first.name}: the deltas give it different shapes.")
        rank = max(part.entry.rank for part in have)
        entries.append(msgspec.structs.replace(first, rank=rank, rows=()))
        tensors[f"{first.name}.A"] = torch.stack([_wide(p, ".A", rank, have[0]) for p in given])
        tensors[f"{first.name}.B"] = torch.stack([_wide(p, ".B", rank, have[0]) for p in given])
    head = deltas[0].header
    touched: dict[str, str] = {}
    for delta in deltas:
        touched |= delta.header.base.touched
    header = msgspec.structs.replace(
        head,
        base=msgspec.structs.replace(head.base, touched=touched),
        form="act_fp32",
        entries=tuple(entries),
        edits=tuple((d.header.edits or (EditRecord(id=""),))[-1] for d in deltas),
        stack=len(deltas),
    )
    return Delta(header, tensors)


def _wide(part: Part | None, suffix: str, rank: int, like: Part) -> Tensor:
    """A [rank I] or B [O rank] of one delta, zero where it has no row."""
    if part is None:
        return torch.zeros_like(_wide(like, suffix, rank, like))
    more = rank - part.entry.rank
    pad = (0, 0, 0, more) if suffix == ".A" else (0, more)
    return F.pad(part.tensors[suffix].to(like.tensors[suffix].dtype), pad)


def _apart(model: Model, deltas: Sequence[Delta], rows: Tensor) -> Model:
    made = [bind(model, delta) for delta in deltas]  # refuses what does not fit before it runs

    def alone(params: Params, number: int) -> Model:
        if params is model.params:
            return made[number]
        return bind(model._replace(params=params), deltas[number], check=False)

    def read(queries: Sequence[Query], *, end: bool = False, edit: Tensor | None = None) -> Inputs:
        numbers = (rows if edit is None else edit).tolist()
        if len(numbers) != len(queries):
            raise ShapeMismatch(
                f"there must be a question for each of the {len(numbers)} rows of `bind_rows`, are "
                f"{len(queries)}."
            )
        put = [
            asked(made[number], [query])[0] if number >= 0 else query
            for number, query in zip(numbers, queries)
        ]
        return model.read(put, end=True) if end else model.read(put)

    plan = Plan(apart=True, apart_below=True, apart_tokens=True, alone=alone)
    reads = any(e.begins() == "read" for delta in deltas for e in delta.header.entries)
    return model._replace(**functions(model, plan), **({"read": read} if reads else {}))
