"""Sum, select all or refuse, scale."""

from __future__ import annotations

from collections.abc import Sequence

from errata.functional.errors import UnsupportedKindError
from errata.functional.kinds.common.algebra import Algebra, EntryTensors

__all__ = ["DENSE_ALGEBRA"]


def _merge(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    present = [part for part in parts if isinstance(part, EntryTensors)]
    total = present[0].tensors[""]
    for part in present[1:]:
        total = total + part.tensors[""]
    num_edits = sum(p if isinstance(p, int) else p.num_edits for p in parts)
    return EntryTensors(present[0].entry, {"": total}, num_edits)


def _select(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    if list(edits) == list(range(part.num_edits)):
        return part
    raise UnsupportedKindError(
        f"{part.entry.name}: a dense change is the sum of its {part.num_edits} edits, and single "
        "ones "
        "cannot be taken out: keep the edits as files of their own and merge the ones you want."
    )


def _scale(part: EntryTensors, factor: float) -> EntryTensors:
    return part._replace(tensors={"": part.tensors[""] * factor})


DENSE_ALGEBRA = Algebra(_merge, _select, _scale)
