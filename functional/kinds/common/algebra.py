"""What each kind of entry can do in the algebra of deltas: join, keep some edits, scale, measure.

`merge.py` works on whole deltas and knows no kind; a kind joins by one `register`. Shape legend:
E edits · r rank · O out · I in.
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
    """The operations of one kind; each raises UnsupportedKindError with the reason where it
    cannot."""

    merge: Callable[
        [Sequence[EntryTensors | int]], EntryTensors
    ]  # an int: a delta of so many edits without it
    select: Callable[
        [EntryTensors, Sequence[int]], EntryTensors | None
    ]  # these edits only; None: nothing left
    scale: Callable[[EntryTensors, float], EntryTensors]


def entries_of(delta: Any) -> dict[tuple[str, str], EntryTensors]:
    """A delta's entries with their tensors, by (name, kind)."""
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
    """The owners of slots that are put one behind the other, and how many slots there are.

    `count(entry)` says how many slots (keys, facts, experts, memories) an entry has; the edits of a
    delta without the entry own none: -1.
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
    """The slots that some edits own, ascending, and the edits' owners among these alone.

    >>> select_slots((2, -1, 0), (0, 1))
    ([2], (0, -1))
    """
    slots = sorted({edit_slots[k] for k in edits} - {-1})
    new_index = {slot: index for index, slot in enumerate(slots)} | {-1: -1}
    return slots, tuple(new_index[edit_slots[k]] for k in edits)
