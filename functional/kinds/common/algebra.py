"""The operations that each kind of entry offers to the algebra of deltas: merge, select, scale.

`functional/deltas/merging.py` works on whole deltas and knows no kind; it finds the operations in
`functional/kinds/table.py`. Shape legend: E edits · r rank · O out · I in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Algebra", "EntryTensors", "concat_slots", "entries_of", "select_slots"]


class EntryTensors(NamedTuple):
    """One entry of a delta, its tensors by suffix ("", ".A", ".B"), and the delta's edits."""

    entry: Any
    tensors: Mapping[str, Tensor]
    num_edits: int


class Algebra(NamedTuple):
    """The operations of one kind. Each raises UnsupportedKindError where it cannot apply."""

    merge: Callable[
        [Sequence[EntryTensors | int]], EntryTensors
    ]  # an int: a delta of so many edits without it
    select: Callable[
        [EntryTensors, Sequence[int]], EntryTensors | None
    ]  # these edits only; None: nothing left
    scale: Callable[[EntryTensors, float], EntryTensors]


def entries_of(delta: Any) -> dict[tuple[str, str], EntryTensors]:
    """Group a delta's tensors by the entry they belong to.

    Args:
        delta: A delta.

    Returns:
        Entries with their tensors, by (name, kind).
    """
    entries = {}
    for entry in delta.header.entries:
        entry_tensors = {
            name[len(entry.name) :]: delta.tensors[name] for name in entry.tensor_specs()
        }
        entries[entry.name, type(entry).__name__] = EntryTensors(
            entry, entry_tensors, len(delta.header.edits)
        )
    return entries


def concat_slots(
    parts: Sequence[EntryTensors | int], count_slots: Callable[[Any], int]
) -> tuple[tuple[int, ...], int]:
    """Renumber the owners of slots when several entries are concatenated.

    Args:
        parts: The entry of each delta; a number stands for so many edits that own no slot.
        count_slots: Counts the slots (keys, facts, experts, memories) of an entry.

    Returns:
        The slot of each edit, -1 for none, and the number of slots.
    """
    edit_slots: list[int] = []
    offset = 0
    for part in parts:
        if isinstance(part, int):
            edit_slots += [-1] * part
            continue
        edit_slots += [slot + offset if slot >= 0 else -1 for slot in part.entry.edit_slots]
        offset += count_slots(part.entry)
    return tuple(edit_slots), offset


def select_slots(
    edit_slots: Sequence[int], edits: Sequence[int]
) -> tuple[list[int], tuple[int, ...]]:
    """Find the slots that some edits own.

    >>> select_slots((2, -1, 0), (0, 1))
    ([2], (0, -1))

    Args:
        edit_slots: The slot of every edit, -1 for none.
        edits: Indices of the edits to keep.

    Returns:
        The kept slots, ascending, and the slot of each kept edit among these.
    """
    slots = sorted({edit_slots[k] for k in edits} - {-1})
    new_index = {slot: index for index, slot in enumerate(slots)} | {-1: -1}
    return slots, tuple(new_index[edit_slots[k]] for k in edits)
