"""The algebra of expert pools: put together, taken apart edit by edit, made weaker or stronger."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from .errors import BadInput
from .header import Experts
from .kinds import Algebra, Part, owned, register

__all__ = []

POOL = (".vision_keys", ".query_keys", ".down", ".up")
ALIKE = 1e-4  # keys of one question: nearer than this, relative to their length


def _join(given: Sequence[Part | int]) -> Part:
    """All experts in one pool; a question edited in two of them keeps the later expert."""
    found = [part for part in given if isinstance(part, Part)]
    first = found[0]
    layouts = [msgspec.structs.replace(part.entry, num_experts=1, owners=()) for part in found]
    rest = [suffix for suffix in first.tensors if suffix not in POOL]
    same = all(torch.equal(part.tensors[s], first.tensors[s]) for part in found[1:] for s in rest)
    if layouts != [layouts[0]] * len(found) or not same:
        raise BadInput(
            f"{first.entry.name}: only experts that one trained editor made share a gate, and "
            "these have gates of their own: bind the deltas one after another."
        )
    owners, count = owned(given, lambda entry: entry.num_experts)
    pool = {suffix: torch.cat([part.tensors[suffix] for part in found]) for suffix in POOL}
    taken = _taken(pool, [part.entry.num_experts for part in found])
    owners = tuple(-1 if expert in taken else expert for expert in owners)
    entry = msgspec.structs.replace(first.entry, num_experts=count, owners=owners)
    whole = Part(entry, {**first.tensors, **pool}, len(owners))
    return _only(whole, [k for k in range(count) if k not in taken])


def _taken(pool: dict[str, Tensor], counts: Sequence[int]) -> set[int]:
    """Experts with the keys of one in a later pool."""
    keys = torch.cat([pool[".vision_keys"], pool[".query_keys"]], 1).float()
    taken: set[int] = set()
    start = 0
    for count in counts[:-1]:
        end = start + count
        mine, later = keys[start:end], keys[end:]
        distance = torch.cdist(mine, later, compute_mode="donot_use_mm_for_euclid_dist")
        hit = (distance <= ALIKE * mine.norm(dim=1, keepdim=True)).any(1)
        taken |= {start + k for k in hit.nonzero()[:, 0].tolist()}
        start = end
    return taken


def _keep(part: Part, keep: Sequence[int]) -> Part | None:
    """Experts that a kept edit owns, bit for bit."""
    owners = tuple(part.entry.owners[k] for k in keep)
    experts = sorted(set(owners) - {-1})
    if not experts:
        return None
    entry = msgspec.structs.replace(part.entry, owners=owners)
    return _only(Part(entry, part.tensors, len(keep)), experts)


def _only(part: Part, experts: Sequence[int]) -> Part:
    """The pool with these experts, ascending; their edits stay their edits."""
    place = {expert: at for at, expert in enumerate(experts)}
    owners = tuple(place.get(expert, -1) for expert in part.entry.owners)
    entry = msgspec.structs.replace(part.entry, num_experts=len(experts), owners=owners)
    index = torch.tensor(experts)
    pool = {s: part.tensors[s].index_select(0, index.to(part.tensors[s].device)) for s in POOL}
    return Part(entry, {**part.tensors, **pool}, part.edits)


def _scale(part: Part, factor: float) -> Part:
    """What experts add, times the factor; whom they reach stays."""
    return part._replace(tensors={**part.tensors, ".up": part.tensors[".up"] * factor})


register(Experts, Algebra(_join, _keep, _scale))
