"""Join codebooks, keep the keys of some edits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from errata.functional.errors import InvalidInputError, UnsupportedKindError
from errata.functional.kinds.common.algebra import Algebra, EntryTensors, concat_slots, select_slots
from errata.kernels import codebook as kernel

__all__ = ["CODEBOOK_ALGEBRA"]


def _merge(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """All keys in one book: the nearest of them decides, the first on ties."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0].entry
    if any(part.entry.replacement != first.replacement for part in present):
        raise InvalidInputError(f"{first.name}: the codebooks replace at different tokens.")
    keys = present[0].tensors[".keys"]
    for part in present[1:]:
        # As near as this, and rounding or the balls' margin decides which of the two is read.
        tolerance = 2e-5 + 4 * torch.finfo(torch.float32).eps * keys.float().norm(dim=1)
        lookup = kernel.lookup_key(part.tensors[".keys"].float(), keys.float(), tolerance)
        if bool(lookup.hit.any()):
            raise InvalidInputError(
                f"{first.name}: two of the codebooks have the same key, and one of its values "
                "would never be read: make those edits in one sequence, so that the later one "
                "replaces the earlier."
            )
        keys = torch.cat([keys, part.tensors[".keys"]])
    edit_slots, num_keys = concat_slots(parts, lambda entry: entry.num_keys)
    entry = msgspec.structs.replace(first, num_keys=num_keys, edit_slots=edit_slots)
    tensors = {s: torch.cat([part.tensors[s] for part in present]) for s in present[0].tensors}
    return EntryTensors(entry, tensors, len(edit_slots))


def _select(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    """Keys that a kept edit owns; radii stay as the sequence of edits left them."""
    slots, edit_slots = select_slots(part.entry.edit_slots, edits)
    if not slots:
        return None
    entry = msgspec.structs.replace(part.entry, num_keys=len(slots), edit_slots=edit_slots)
    index = torch.tensor(slots, dtype=torch.int64, device="cpu")
    tensors = {s: x.index_select(0, index.to(x.device)) for s, x in part.tensors.items()}
    return EntryTensors(entry, tensors, len(edits))


def _scale(part: EntryTensors, factor: float) -> EntryTensors:
    raise UnsupportedKindError(
        f"{part.entry.name}: a codebook's value replaces an output, and half of a replacement is "
        "none: edit again, or remove edits by id."
    )


CODEBOOK_ALGEBRA = Algebra(_merge, _select, _scale)
