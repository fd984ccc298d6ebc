"""Concatenate ranks, drop the ranks of an edit, scale B."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from errata.functional.errors import UnsupportedKindError
from errata.functional.kinds.common.algebra import Algebra, EntryTensors

__all__ = ["LOWRANK_ALGEBRA", "ranks_per_edit"]


def ranks_per_edit(part: EntryTensors) -> tuple[int, ...]:
    """The rank of each edit in a low-rank entry.

    Args:
        part: Entry with its tensors.

    Returns:
        One rank per edit; () if the entry does not say.
    """
    if part.entry.edit_ranks:
        return part.entry.edit_ranks
    return (part.entry.rank,) if part.num_edits == 1 else ()


def _merge(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """B A + B' A' = [B B'] [A; A']: exact; each edit keeps its rows."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0].entry
    edit_ranks: list[int] = []
    all_known = True
    for part in parts:
        ranks = (0,) * part if isinstance(part, int) else ranks_per_edit(part)
        all_known = all_known and (isinstance(part, int) or bool(ranks))
        edit_ranks += ranks
    rank = sum(part.entry.rank for part in present)
    entry = msgspec.structs.replace(
        first, rank=rank, edit_ranks=tuple(edit_ranks) if all_known else ()
    )
    tensors = {
        ".A": torch.cat([part.tensors[".A"] for part in present], dim=0),
        ".B": torch.cat([part.tensors[".B"] for part in present], dim=1),
    }
    return EntryTensors(
        entry, tensors, sum(p if isinstance(p, int) else p.num_edits for p in parts)
    )


def _select(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    edit_ranks = ranks_per_edit(part)
    if not edit_ranks:
        raise UnsupportedKindError(
            f"{part.entry.name}: an edit can be taken out only where it has rows of its own, and "
            f"all {part.entry.rank} rows are shared by {part.num_edits} edits: undo the whole "
            "delta."
        )
    ends = [sum(edit_ranks[: k + 1]) for k in range(len(edit_ranks))]
    index = [row for k in edits for row in range(ends[k] - edit_ranks[k], ends[k])]
    if not index:
        return None
    rank_index = torch.tensor(index, dtype=torch.int64, device="cpu")
    entry = msgspec.structs.replace(
        part.entry, rank=len(index), edit_ranks=tuple(edit_ranks[k] for k in edits)
    )
    tensors = {
        ".A": part.tensors[".A"].index_select(0, rank_index.to(part.tensors[".A"].device)),
        ".B": part.tensors[".B"].index_select(1, rank_index.to(part.tensors[".B"].device)),
    }
    return EntryTensors(entry, tensors, len(edits))


def _scale(part: EntryTensors, factor: float) -> EntryTensors:
    return part._replace(tensors={".A": part.tensors[".A"], ".B": part.tensors[".B"] * factor})


LOWRANK_ALGEBRA = Algebra(_merge, _select, _scale)
