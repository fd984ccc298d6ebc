"""The algebra of `scope` entries: memories join, single edits are taken out, nothing is scaled."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.kernels import codebook as kernel

from .entries import Scope
from .errors import BadInput, KindUnsupported
from .kinds import Algebra, Part, kept, owned, register

__all__ = ["padded"]

_MEMORY = (".keys", ".replies", ".scenes", ".prompts", ".answers")


def padded(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Memories one after another along `axis`, each padded behind with zeros to the longest."""
    where = 1 if axis == 0 else axis + 1
    if tensors[0].ndim <= where + 1:
        return torch.cat(list(tensors), axis)
    most = max(tensor.shape[where] for tensor in tensors)
    short = [most - tensor.shape[where] for tensor in tensors]
    # a memory that is long enough is not copied twice
    wide = [F.pad(t, (0, 0, 0, more)) if more else t for t, more in zip(tensors, short)]
    return torch.cat(wide, axis)


def _join(given: Sequence[Part | int]) -> Part:
    """All memories behind one network."""
    found = [part for part in given if isinstance(part, Part)]
    first = found[0]
    fixed = ("sizes", "gate", "threshold")
    for part in found[1:]:
        same = all(getattr(part.entry, f) == getattr(first.entry, f) for f in fixed)
        if not (same and all(torch.equal(part.tensors[n], first.tensors[n]) for n in _net(first))):
            raise BadInput(
                f"{first.entry.name}: these memories belong to different classifiers or gates, "
                "and no one of them reads the others' keys: make the edits with one trained state."
            )
    keys = first.tensors[".keys"]
    for part in found[1:]:
        alike = 1e-5 + 4 * torch.finfo(torch.float32).eps * keys.float().norm(dim=1)
        if bool(kernel.lookup(part.tensors[".keys"].float(), keys.float(), alike).hit.any()):
            raise BadInput(
                f"{first.entry.name}: two of the deltas edit the same question, and one of the "
                "answers would never be given: make those edits in one sequence, so that the later "
                "one replaces the earlier."
            )
        keys = torch.cat([keys, part.tensors[".keys"]])
    owners, slots = owned(given, lambda entry: entry.slots)
    memory = {s: padded([part.tensors[s] for part in found]) for s in _MEMORY}
    entry = msgspec.structs.replace(
        first.entry,
        slots=slots,
        replies=max(part.entry.replies for part in found),
        prompts=max(part.entry.prompts for part in found),
        owners=owners,
    )
    return Part(entry, {**first.tensors, **memory}, len(owners))


def _keep(part: Part, keep: Sequence[int]) -> Part | None:
    """The slots that a kept edit owns, and no more padding than they need."""
    slots, owners = kept(part.entry.owners, keep)
    if not slots:
        return None
    index = torch.tensor(slots, device=part.tensors[".keys"].device)
    memory = {s: part.tensors[s].index_select(0, index) for s in _MEMORY}
    replies, prompts = _longest(memory[".replies"]), _longest(memory[".prompts"])
    for suffix, most in ((".replies", replies), (".prompts", prompts), (".answers", replies)):
        memory[suffix] = memory[suffix][:, :most].contiguous()
    entry = msgspec.structs.replace(
        part.entry,
        slots=len(slots),
        replies=replies,
        prompts=prompts,
        owners=owners,
    )
    return Part(entry, {**part.tensors, **memory}, len(keep))


def _scale(part: Part, factor: float) -> Part:
    raise KindUnsupported(
        f"{part.entry.name}: an answer that takes the place of another has no half: edit with a "
        "soft gate, or remove edits by id."
    )


def _net(part: Part) -> list[str]:
    return [name for name in part.tensors if name not in _MEMORY]


def _longest(rows: Tensor) -> int:
    """How many rows [N P d] are not padding in at least one slot; at least one."""
    used = (rows != 0).any(-1).any(0).nonzero()
    return int(used.max()) + 1 if len(used) else 1


register(Scope, Algebra(_join, _keep, _scale))
