"""The algebra of `scope` entries: memories join, single edits are taken out, nothing is scaled."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.errors import InvalidInputError, UnsupportedKindError
from errata.functional.kinds.common.algebra import Algebra, EntryTensors, concat_slots, select_slots
from errata.kernels import codebook as kernel

__all__ = ["SCOPE_ALGEBRA", "pad_and_concat"]

_EDIT_TENSORS = (".keys", ".answer_states", ".image_states", ".prompt_states", ".answer_outputs")


def pad_and_concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Concatenate memories, each padded at the end with zeros to the longest.

    Args:
        tensors: Memories of equal rank.
        axis: The axis to concatenate along.

    Returns:
        The concatenation.
    """
    pad_axis = 1 if axis == 0 else axis + 1
    if tensors[0].ndim <= pad_axis + 1:
        return torch.cat(list(tensors), axis)
    longest = max(tensor.shape[pad_axis] for tensor in tensors)
    num_missing = [longest - tensor.shape[pad_axis] for tensor in tensors]
    # a memory that is long enough is not copied twice
    padded = [F.pad(t, (0, 0, 0, count)) if count else t for t, count in zip(tensors, num_missing)]
    return torch.cat(padded, axis)


def _merge(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """All memories of one network."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0]
    compared_fields = ("sizes", "gate", "threshold")
    for part in present[1:]:
        same_fields = all(
            getattr(part.entry, f) == getattr(first.entry, f) for f in compared_fields
        )
        if not (
            same_fields
            and all(torch.equal(part.tensors[n], first.tensors[n]) for n in _network_tensors(first))
        ):
            raise InvalidInputError(
                f"{first.entry.name}: these memories belong to different classifiers or gates, "
                "and no one of them reads the others' keys: make the edits with one trained state."
            )
    keys = first.tensors[".keys"]
    for part in present[1:]:
        tolerance = 1e-5 + 4 * torch.finfo(torch.float32).eps * keys.float().norm(dim=1)
        if bool(
            kernel.lookup_key(part.tensors[".keys"].float(), keys.float(), tolerance).hit.any()
        ):
            raise InvalidInputError(
                f"{first.entry.name}: two of the deltas edit the same question, and one of the "
                "answers would never be given: make those edits in one sequence, so that the later "
                "one replaces the earlier."
            )
        keys = torch.cat([keys, part.tensors[".keys"]])
    edit_slots, num_slots = concat_slots(parts, lambda entry: entry.num_slots)
    edit_tensors = {s: pad_and_concat([part.tensors[s] for part in present]) for s in _EDIT_TENSORS}
    entry = msgspec.structs.replace(
        first.entry,
        num_slots=num_slots,
        max_answer_tokens=max(part.entry.max_answer_tokens for part in present),
        max_prompt_tokens=max(part.entry.max_prompt_tokens for part in present),
        edit_slots=edit_slots,
    )
    return EntryTensors(entry, {**first.tensors, **edit_tensors}, len(edit_slots))


def _select(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    """The slots that a kept edit owns, and no more padding than they need."""
    slots, edit_slots = select_slots(part.entry.edit_slots, edits)
    if not slots:
        return None
    index = torch.tensor(slots, device=part.tensors[".keys"].device, dtype=torch.int64)
    edit_tensors = {s: part.tensors[s].index_select(0, index) for s in _EDIT_TENSORS}
    max_answer_tokens, max_prompt_tokens = (
        _num_used_rows(edit_tensors[".answer_states"]),
        _num_used_rows(edit_tensors[".prompt_states"]),
    )
    for suffix, length in (
        (".answer_states", max_answer_tokens),
        (".prompt_states", max_prompt_tokens),
        (".answer_outputs", max_answer_tokens),
    ):
        edit_tensors[suffix] = edit_tensors[suffix][:, :length].contiguous()
    entry = msgspec.structs.replace(
        part.entry,
        num_slots=len(slots),
        max_answer_tokens=max_answer_tokens,
        max_prompt_tokens=max_prompt_tokens,
        edit_slots=edit_slots,
    )
    return EntryTensors(entry, {**part.tensors, **edit_tensors}, len(edits))


def _scale(part: EntryTensors, factor: float) -> EntryTensors:
    raise UnsupportedKindError(
        f"{part.entry.name}: an answer that takes the place of another has no half: edit with a "
        "soft gate, or remove edits by id."
    )


def _network_tensors(part: EntryTensors) -> list[str]:
    return [name for name in part.tensors if name not in _EDIT_TENSORS]


def _num_used_rows(rows: Tensor) -> int:
    """How many rows [N P d] are not padding in at least one slot; at least one."""
    used = (rows != 0).any(-1).any(0).nonzero()
    return int(used.max()) + 1 if len(used) else 1


SCOPE_ALGEBRA = Algebra(_merge, _select, _scale)
