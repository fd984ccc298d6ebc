"""The algebra of expert pools: put together, taken apart edit by edit, made weaker or stronger."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from errata.functional.errors import InvalidInputError
from errata.functional.kinds.common.algebra import Algebra, EntryTensors, concat_slots

__all__ = ["EXPERTS_ALGEBRA"]

POOL_TENSORS = (".vision_keys", ".query_keys", ".down", ".up")
SAME_KEY_TOLERANCE = 1e-4  # keys of one question: nearer than this, relative to their length


def _merge(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """All experts in one pool; a question edited in two of them keeps the later expert."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0]
    layouts = [
        msgspec.structs.replace(part.entry, num_experts=1, edit_slots=()) for part in present
    ]
    shared_tensors = [suffix for suffix in first.tensors if suffix not in POOL_TENSORS]
    same = all(
        torch.equal(part.tensors[s], first.tensors[s])
        for part in present[1:]
        for s in shared_tensors
    )
    if layouts != [layouts[0]] * len(present) or not same:
        raise InvalidInputError(
            f"{first.entry.name}: only experts that one trained editor made share a gate, and "
            "these have gates of their own: bind the deltas one after another."
        )
    edit_slots, num_experts = concat_slots(parts, lambda entry: entry.num_experts)
    pool = {
        suffix: torch.cat([part.tensors[suffix] for part in present]) for suffix in POOL_TENSORS
    }
    replaced = _replaced_experts(pool, [part.entry.num_experts for part in present])
    edit_slots = tuple(-1 if expert in replaced else expert for expert in edit_slots)
    entry = msgspec.structs.replace(first.entry, num_experts=num_experts, edit_slots=edit_slots)
    merged = EntryTensors(entry, {**first.tensors, **pool}, len(edit_slots))
    return _take_experts(merged, [k for k in range(num_experts) if k not in replaced])


def _replaced_experts(pool: dict[str, Tensor], counts: Sequence[int]) -> set[int]:
    """Experts with the keys of one in a later pool."""
    keys = torch.cat([pool[".vision_keys"], pool[".query_keys"]], 1).float()
    replaced: set[int] = set()
    start = 0
    for count in counts[:-1]:
        end = start + count
        pool_keys, later_keys = keys[start:end], keys[end:]
        distance = torch.cdist(pool_keys, later_keys, compute_mode="donot_use_mm_for_euclid_dist")
        hit = (distance <= SAME_KEY_TOLERANCE * pool_keys.norm(dim=1, keepdim=True)).any(1)
        replaced |= {start + k for k in hit.nonzero()[:, 0].tolist()}
        start = end
    return replaced


def _select(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    """Experts that a kept edit owns, bit for bit."""
    edit_slots = tuple(part.entry.edit_slots[k] for k in edits)
    experts = sorted(set(edit_slots) - {-1})
    if not experts:
        return None
    entry = msgspec.structs.replace(part.entry, edit_slots=edit_slots)
    return _take_experts(EntryTensors(entry, part.tensors, len(edits)), experts)


def _take_experts(part: EntryTensors, experts: Sequence[int]) -> EntryTensors:
    """The pool with these experts, ascending; their edits stay their edits."""
    new_index = {expert: position for position, expert in enumerate(experts)}
    edit_slots = tuple(new_index.get(expert, -1) for expert in part.entry.edit_slots)
    entry = msgspec.structs.replace(part.entry, num_experts=len(experts), edit_slots=edit_slots)
    index = torch.tensor(experts, dtype=torch.int64, device="cpu")
    pool = {
        s: part.tensors[s].index_select(0, index.to(part.tensors[s].device)) for s in POOL_TENSORS
    }
    return EntryTensors(entry, {**part.tensors, **pool}, part.num_edits)


def _scale(part: EntryTensors, factor: float) -> EntryTensors:
    """What experts add, times the factor; whom they reach stays."""
    return part._replace(tensors={**part.tensors, ".up": part.tensors[".up"] * factor})


EXPERTS_ALGEBRA = Algebra(_merge, _select, _scale)
