"""One batch whose rows run under different deltas."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.binding.bound_model import bind
from errata.functional.binding.edited_forward import HookPlan, edited_functions
from errata.functional.deltas.merging import require_same_base
from errata.functional.errors import InvalidInputError, ShapeError, UnsupportedKindError
from errata.functional.header import EditRecord
from errata.functional.kinds.common.algebra import EntryTensors, entries_of
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.kinds.prompt.apply import expand_prompts
from errata.functional.queries import Query
from errata.functional.types import Batch, Delta, Hooks, Inputs, Model, Params

__all__ = ["bind_rows", "stack_padded"]


def bind_rows(model: Model, deltas: Sequence[Delta], rows: Sequence[int] | Tensor) -> Model:
    """Bind a different delta to every row of a batch.

    Low-rank deltas, of any ranks and parameters, run as one grouped product, in fp32 and rounded
    once, whatever their arithmetic. If any delta has another kind, the rows of each delta run
    separately, each in its own arithmetic.

    Args:
        model: The model.
        deltas: The edits.
        rows: [B], for each row of a batch the index of its delta, -1 for none.

    Returns:
        A model for batches of B rows. `generate` keeps rows in order:
        `generate(bind_rows(model, [cat, dog], [0, 1, -1]), three_queries)`.

    Raises:
        InvalidInputError: If a row names no delta.
        UnsupportedKindError: If a delta is stacked already.
        BaseMismatchError: If the deltas have different bases, or one does not fit the model.
        UnknownSiteError: If the model lacks a parameter of a delta.
        ShapeError: If a tensor does not fit its parameter, or a batch has other than B rows.
    """
    rows = torch.as_tensor(rows, dtype=torch.long, device="cpu")
    if not deltas or rows.ndim != 1 or bool(((rows < -1) | (rows >= len(deltas))).any()):
        raise InvalidInputError(
            f"each row must name one of {len(deltas)} delta(s) by number, or -1 for none, got "
            f"{rows.flatten()[:12].tolist()}."
        )
    if any(delta.header.stack for delta in deltas):
        raise UnsupportedKindError(
            "a stacked delta names its rows itself: `unstack` it for `bind_rows`."
        )
    require_same_base(deltas)
    if all(isinstance(entry, LowRank) for delta in deltas for entry in delta.header.entries):
        bound = bind(model, stack_padded(deltas))
    else:
        bound = _bind_per_row(model, deltas, rows)

    def embed(
        params: Params,
        inputs: Inputs,
        hooks: Hooks | None = None,
        edit_index: Tensor | None = None,
    ) -> Batch:
        if edit_index is None and len(inputs.input_ids) != len(rows):
            raise ShapeError(
                f"the batch must have a row for each of the {len(rows)} numbers given to "
                f"`bind_rows`, has {len(inputs.input_ids)}."
            )
        row_edits = rows.to(inputs.input_ids.device) if edit_index is None else edit_index
        return bound.embed(params, inputs, hooks or {}, edit_index=row_edits)

    return bound._replace(embed=embed, deltas=(*model.deltas, *deltas))


def stack_padded(deltas: Sequence[Delta]) -> Delta:
    """Stack low-rank deltas of any ranks and parameters.

    Ranks are padded with zeros. A parameter that a delta does not change gets zero factors.

    Args:
        deltas: Low-rank deltas, none of them stacked.

    Returns:
        The stacked delta, with arithmetic "act_fp32". A delta with several edits becomes one edit,
        under the record of its last.

    Raises:
        ShapeError: If deltas give a parameter different shapes or layouts.
    """
    delta_entries = [entries_of(delta) for delta in deltas]
    entries, tensors = [], {}
    for key in sorted({key for entries_by_key in delta_entries for key in entries_by_key}):
        same_entries = [mine.get(key) for mine in delta_entries]
        present = [part for part in same_entries if part is not None]
        first = present[0].entry
        if any(
            (p.entry.shape, p.entry.transposed) != (first.shape, first.transposed) for p in present
        ):
            raise ShapeError(f"{first.name}: the deltas give it different shapes.")
        rank = max(part.entry.rank for part in present)
        entries.append(msgspec.structs.replace(first, rank=rank, edit_ranks=()))
        tensors[f"{first.name}.A"] = torch.stack(
            [_pad_rank(p, ".A", rank, present[0]) for p in same_entries]
        )
        tensors[f"{first.name}.B"] = torch.stack(
            [_pad_rank(p, ".B", rank, present[0]) for p in same_entries]
        )
    head = deltas[0].header
    parameter_hashes: dict[str, str] = {}
    for delta in deltas:
        parameter_hashes |= delta.header.base.parameter_hashes
    header = msgspec.structs.replace(
        head,
        base=msgspec.structs.replace(head.base, parameter_hashes=parameter_hashes),
        arithmetic="act_fp32",
        entries=tuple(entries),
        edits=tuple((d.header.edits or (EditRecord(id=""),))[-1] for d in deltas),
        stack=len(deltas),
    )
    return Delta(header, tensors)


def _pad_rank(part: EntryTensors | None, suffix: str, rank: int, like: EntryTensors) -> Tensor:
    """Pad A [rank I] or B [O rank] of one delta with zeros; all zeros if it has no such entry."""
    if part is None:
        return torch.zeros_like(_pad_rank(like, suffix, rank, like))
    num_new_ranks = rank - part.entry.rank
    pad = (0, 0, 0, num_new_ranks) if suffix == ".A" else (0, num_new_ranks)
    return F.pad(part.tensors[suffix].to(like.tensors[suffix].dtype), pad)


def _bind_per_row(model: Model, deltas: Sequence[Delta], rows: Tensor) -> Model:
    bound_models = [
        bind(model, delta) for delta in deltas
    ]  # refuses what does not fit before it runs

    def bind_one(params: Params, number: int) -> Model:
        if params is model.params:
            return bound_models[number]
        return bind(model._replace(params=params), deltas[number], check=False)

    def preprocess(
        queries: Sequence[Query], *, append_eos: bool = False, edit_index: Tensor | None = None
    ) -> Inputs:
        numbers = (rows if edit_index is None else edit_index).tolist()
        if len(numbers) != len(queries):
            raise ShapeError(
                f"there must be a question for each of the {len(numbers)} rows of `bind_rows`, are "
                f"{len(queries)}."
            )
        expanded = [
            expand_prompts(bound_models[number], [query])[0] if number >= 0 else query
            for number, query in zip(numbers, queries)
        ]
        return (
            model.preprocess(expanded, append_eos=True)
            if append_eos
            else model.preprocess(expanded)
        )

    plan = HookPlan(per_edit=True, embed_per_edit=True, embed_next_per_edit=True, bind_one=bind_one)
    changes_prompt = any(e.acts_on() == "prompt" for delta in deltas for e in delta.header.entries)
    return model._replace(
        **edited_functions(model, plan), **({"preprocess": preprocess} if changes_prompt else {})
    )
