"""Memories of facts as values: joined, and some of their edits kept. They can not be scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from .entries import Prompt
from .errors import BadInput, KindUnsupported, listed
from .kinds import Algebra, Part, kept, owned, register

__all__ = ["joined"]

_MEMORY = (".questions", ".pictures", ".shown", ".sizes")
_OWN = {"facts", "num_facts", "owners", "num_shown", "shown_bytes"}


def joined(given: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Memories one behind the other, by suffix; PNG files padded to the longest of them."""
    tensors = {
        suffix: torch.cat([one[suffix] for one in given])
        for suffix in (".questions", ".pictures")
        if suffix in given[0]
    }
    if any(".shown" in one for one in given):
        files = [one[".shown"] for one in given if ".shown" in one]
        most, bytes_ = (max(file.shape[axis] for file in files) for axis in (1, 2))
        shown, sizes = [], []
        for one in given:
            count, like = len(one[".questions"]), one[".questions"]
            file = one.get(".shown", like.new_zeros(count, 0, 0, dtype=torch.uint8))
            size = one.get(".sizes", like.new_zeros(count, 0, dtype=torch.int64))
            shown.append(F.pad(file, (0, bytes_ - file.shape[2], 0, most - file.shape[1])))
            sizes.append(F.pad(size, (0, most - size.shape[1])))
        tensors |= {".shown": torch.cat(shown), ".sizes": torch.cat(sizes)}
    return tensors


def _join(given: Sequence[Part | int]) -> Part:
    """All facts in one memory, in order: of two that fit a question equally the later counts."""
    found = [part for part in given if isinstance(part, Part)]
    first = found[0]
    alike = [f for f in first.entry.__struct_fields__ if f not in _OWN]
    wrong = {
        field
        for part in found[1:]
        for field in alike
        if getattr(part.entry, field) != getattr(first.entry, field)
    }
    demos = [suffix for suffix in first.tensors if suffix not in _MEMORY]
    wrong |= {
        "the demonstrations"
        for part in found[1:]
        if not wrong and not all(torch.equal(first.tensors[s], part.tensors[s]) for s in demos)
    }
    if wrong:
        raise BadInput(
            f"{first.entry.name}: memories of facts must retrieve alike to become one, and these "
            f"differ in {listed(sorted(wrong))}: make the edits with one editor."
        )
    owners, _ = owned(given, lambda entry: entry.num_facts)
    tensors = {s: first.tensors[s] for s in demos}
    tensors |= joined([{s: part.tensors[s] for s in _MEMORY if s in part.tensors}
                       for part in found])  # fmt: skip
    facts = tuple(fact for part in found for fact in part.entry.facts)
    return Part(_entry(first.entry, facts, owners, tensors), tensors, len(owners))


def _keep(part: Part, keep: Sequence[int]) -> Part | None:
    """The facts that a kept edit owns, and no more pictures than they need."""
    facts, owners = kept(part.entry.owners, keep)
    if not facts:
        return None
    index = torch.tensor(facts)
    tensors = {
        s: x.index_select(0, index.to(x.device)) if s in _MEMORY else x
        for s, x in part.tensors.items()
    }
    if ".sizes" in tensors:
        most = int((tensors[".sizes"] > 0).sum(1).max())
        size = _blocks(int(tensors[".sizes"].max()))
        if most:
            tensors[".shown"] = tensors[".shown"][:, :most, :size].contiguous()
            tensors[".sizes"] = tensors[".sizes"][:, :most].contiguous()
        else:
            del tensors[".shown"], tensors[".sizes"]
    said = tuple(part.entry.facts[fact] for fact in facts)
    return Part(_entry(part.entry, said, owners, tensors), tensors, len(keep))


def _entry(
    entry: Prompt, facts: tuple[str, ...], owners: tuple[int, ...], tensors: dict[str, Tensor]
) -> Prompt:
    shown = tensors.get(".shown")
    return msgspec.structs.replace(
        entry,
        facts=facts,
        num_facts=len(facts),
        owners=owners,
        num_shown=0 if shown is None else shown.shape[1],
        shown_bytes=0 if shown is None else shown.shape[2],
    )


BLOCK = 4096  # PNG files take up a multiple of so many bytes, so that edits alike stack


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _scale(part: Part, factor: float) -> Part:
    raise KindUnsupported(
        f"{part.entry.name}: a fact in words can not be said by half: remove edits by id."
    )


register(Prompt, Algebra(_join, _keep, _scale))
