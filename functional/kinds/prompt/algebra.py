"""Algebra of memories of facts: merge them, select some of their edits. They cannot be scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.errors import InvalidInputError, UnsupportedKindError, join_messages
from errata.functional.kinds.common.algebra import Algebra, EntryTensors, concat_slots, select_slots
from errata.functional.kinds.prompt.entry import Prompt

__all__ = ["PROMPT_ALGEBRA", "merge_memories"]

_EDIT_TENSORS = (".question_keys", ".image_keys", ".images", ".image_sizes")
_EDIT_FIELDS = {"facts", "num_facts", "edit_slots", "num_images", "image_bytes"}


def merge_memories(memories: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate memories of facts; PNG files are padded to the longest.

    Args:
        memories: Tensors of each memory, by suffix.

    Returns:
        Tensors of the merged memory, by suffix.
    """
    tensors = {
        suffix: torch.cat([one[suffix] for one in memories])
        for suffix in (".question_keys", ".image_keys")
        if suffix in memories[0]
    }
    if any(".images" in one for one in memories):
        files = [one[".images"] for one in memories if ".images" in one]
        max_images, max_bytes = (max(file.shape[axis] for file in files) for axis in (1, 2))
        images, image_sizes = [], []
        for memory in memories:
            count, like = len(memory[".question_keys"]), memory[".question_keys"]
            file = memory.get(".images", like.new_zeros(count, 0, 0, dtype=torch.uint8))
            size = memory.get(".image_sizes", like.new_zeros(count, 0, dtype=torch.int64))
            images.append(
                F.pad(file, (0, max_bytes - file.shape[2], 0, max_images - file.shape[1]))
            )
            image_sizes.append(F.pad(size, (0, max_images - size.shape[1])))
        tensors |= {".images": torch.cat(images), ".image_sizes": torch.cat(image_sizes)}
    return tensors


def _merge(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """All facts in one memory, in order: of two that fit a question equally the later counts."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0]
    compared_fields = [f for f in first.entry.__struct_fields__ if f not in _EDIT_FIELDS]
    differing = {
        field
        for part in present[1:]
        for field in compared_fields
        if getattr(part.entry, field) != getattr(first.entry, field)
    }
    shared_tensors = [suffix for suffix in first.tensors if suffix not in _EDIT_TENSORS]
    differing |= {
        "the demonstrations"
        for part in present[1:]
        if not differing
        and not all(torch.equal(first.tensors[s], part.tensors[s]) for s in shared_tensors)
    }
    if differing:
        raise InvalidInputError(
            f"{first.entry.name}: memories of facts must retrieve alike to become one, and these "
            f"differ in {join_messages(sorted(differing))}: make the edits with one editor."
        )
    edit_slots, _ = concat_slots(parts, lambda entry: entry.num_facts)
    tensors = {s: first.tensors[s] for s in shared_tensors}
    tensors |= merge_memories(
        [{s: part.tensors[s] for s in _EDIT_TENSORS if s in part.tensors} for part in present]
    )
    facts = tuple(fact for part in present for fact in part.entry.facts)
    return EntryTensors(
        _updated_entry(first.entry, facts, edit_slots, tensors), tensors, len(edit_slots)
    )


def _select(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    """The facts that a kept edit owns, and no more images than they need."""
    facts, edit_slots = select_slots(part.entry.edit_slots, edits)
    if not facts:
        return None
    index = torch.tensor(facts, dtype=torch.int64, device="cpu")
    tensors = {
        s: x.index_select(0, index.to(x.device)) if s in _EDIT_TENSORS else x
        for s, x in part.tensors.items()
    }
    if ".image_sizes" in tensors:
        max_images = int((tensors[".image_sizes"] > 0).sum(1).max())
        image_bytes = _round_up(int(tensors[".image_sizes"].max()))
        if max_images:
            tensors[".images"] = tensors[".images"][:, :max_images, :image_bytes].contiguous()
            tensors[".image_sizes"] = tensors[".image_sizes"][:, :max_images].contiguous()
        else:
            del tensors[".images"], tensors[".image_sizes"]
    texts = tuple(part.entry.facts[fact] for fact in facts)
    return EntryTensors(_updated_entry(part.entry, texts, edit_slots, tensors), tensors, len(edits))


def _updated_entry(
    entry: Prompt, facts: tuple[str, ...], edit_slots: tuple[int, ...], tensors: dict[str, Tensor]
) -> Prompt:
    images = tensors.get(".images")
    return msgspec.structs.replace(
        entry,
        facts=facts,
        num_facts=len(facts),
        edit_slots=edit_slots,
        num_images=0 if images is None else images.shape[1],
        image_bytes=0 if images is None else images.shape[2],
    )


CHUNK_BYTES = 4096  # PNG files take up a multiple of so many bytes, so that edits alike stack


def _round_up(size: int) -> int:
    return -(-size // CHUNK_BYTES) * CHUNK_BYTES


def _scale(part: EntryTensors, factor: float) -> EntryTensors:
    raise UnsupportedKindError(
        f"{part.entry.name}: a fact in words cannot be said by half: remove edits by id."
    )


PROMPT_ALGEBRA = Algebra(_merge, _select, _scale)
