"""Side memories side by side; whole memories only."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from errata.functional.errors import InvalidInputError, UnsupportedKindError
from errata.functional.kinds.common.algebra import Algebra, EntryTensors, concat_slots, select_slots

__all__ = ["MASKED_ALGEBRA"]

# The algebra: memories are kept or left whole.


def _merge(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """All memories side by side: of those that reach their threshold the one furthest off wins."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0].entry
    for what in ("activation", "gate_statistic"):
        if any(getattr(part.entry, what) != getattr(first, what) for part in present):
            raise InvalidInputError(f"{first.name}: the memories measure by another {what}.")
    edit_slots, _ = concat_slots(parts, lambda entry: len(entry.num_values))
    num_values = tuple(count for part in present for count in part.entry.num_values)
    entry = msgspec.structs.replace(first, num_values=num_values, edit_slots=edit_slots)
    tensors = {s: torch.cat([part.tensors[s] for part in present]) for s in present[0].tensors}
    return EntryTensors(entry, tensors, len(edit_slots))


def _select(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    """Memories whose edits are all kept; those that no kept edit owns go."""
    entry = part.entry
    memories, edit_slots = select_slots(entry.edit_slots, edits)
    removed = {entry.edit_slots[k] for k in set(range(part.num_edits)) - set(edits)}
    shared = removed & set(memories)
    if shared:
        raise UnsupportedKindError(
            f"{entry.name}: edits of one side memory are trained into the same values, and "
            f"{len(shared)} memory(s) would have to lose some and keep others: edit with "
            "save_freq=1, take all edits of a memory out together, or edit again without them."
        )
    if not memories:
        return None
    ends = torch.tensor(entry.num_values, dtype=torch.int64, device="cpu").cumsum(0).tolist()
    values = [part.tensors[".values"][ends[m] - entry.num_values[m] : ends[m]] for m in memories]
    num_values = tuple(entry.num_values[m] for m in memories)
    selected = msgspec.structs.replace(entry, num_values=num_values, edit_slots=edit_slots)
    tensors = {
        ".mask": part.tensors[".mask"][memories],
        ".values": torch.cat(values),
        ".thresholds": part.tensors[".thresholds"][memories],
    }
    return EntryTensors(selected, tensors, len(edits))


def _scale(part: EntryTensors, factor: float) -> EntryTensors:
    raise UnsupportedKindError(
        f"{part.entry.name}: half of a side memory would reach its threshold for other questions "
        "than the whole: edit again, or remove edits by id."
    )


MASKED_ALGEBRA = Algebra(_merge, _select, _scale)
