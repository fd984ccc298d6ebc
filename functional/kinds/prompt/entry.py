"""Facts and demonstrations put before a question as text: IKE's memory (and LTE's)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from errata.functional.header import (
    FLOAT_DTYPES,
    ActsOn,
    Entry,
    SlotEntry,
    TensorSpec,
    invalid_names,
)

if TYPE_CHECKING:
    from errata.functional.header import Header  # noqa: TID252

__all__ = ["DemonstrationKey", "DemonstrationOrder", "Prompt"]

DemonstrationKey = Literal["question", "fact"]
"""What demonstrations are retrieved by: the fact with the question asked, or the fact alone."""

DemonstrationOrder = Literal["nearest-last", "nearest-first"]
"""The order of retrieved demonstrations before the fact."""


_PATH = re.compile(r"[/~\\\\]|[A-Za-z]:[\\\\/]|file:", re.ASCII)


class Prompt(SlotEntry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="prompt"):
    """Texts prepended to a question: the facts that match it, and demonstrations of their use.

    Tensors of a memory of N facts: `<name>.question_keys` [N d], unit keys of their questions;
    `<name>.image_keys` [N v], unit keys of their images, zero without one (absent if v = 0);
    `<name>.images` U8 [N S W] and `<name>.image_sizes` I64 [N S], PNG files prepended with the
    fact, padded with zeros (absent if S = 0). Shared by all edits, with D demonstrations:
    `<name>.demonstrations` U8, their texts concatenated, `<name>.demonstration_ends` I64 [D] and
    `<name>.demonstration_keys` [D d]; with S' images `<name>.demonstration_images` U8, PNG files
    concatenated, `<name>.demonstration_image_ends` I64 [S'] and
    `<name>.demonstration_image_index` I64 [D], the image of each demonstration or -1.

    `facts` are the prepended texts, with `<image>` for each image; in a stack those of all edits,
    memory after memory. `edit_slots[k]` is the fact of edit k, -1 for none. `name` is the token
    embedding, which identifies the base.
    """

    name: str
    checkpoint_name: str
    shape: tuple[int, ...]
    facts: tuple[str, ...] = ()
    num_facts: int  # N, of each memory
    question_template: str = "{question}"  # how the question follows
    encoder: str  # of questions: see `adapters/inputs/sentence_encoders.py`
    key_size: int  # d
    image_key_size: int = 0  # v
    min_similarity: float = -1.0  # similarity of questions below which a fact is not put in
    min_image_similarity: float = -1.0  # the same of images
    max_facts: int = 1  # facts put in
    num_demonstrations: int = 0  # demonstrations put in
    demonstration_key: DemonstrationKey = "question"
    demonstration_order: DemonstrationOrder = "nearest-last"
    reserved_tokens: int = 0  # tokens of the context that demonstrations leave free
    num_images: int = 0  # S
    image_bytes: int = 0  # W
    num_stored_demonstrations: int = 0  # D
    demonstration_bytes: int = 0
    num_demonstration_images: int = 0  # S'
    demonstration_image_bytes: int = 0

    def acts_on(self) -> ActsOn:
        return "prompt"

    def per_edit_tensors(self) -> dict[str, TensorSpec]:
        """The tensors that each edit has of its own."""
        count = self.num_facts
        specs: dict[str, TensorSpec] = {"question_keys": (FLOAT_DTYPES, (count, self.key_size))}
        if self.image_key_size:
            specs["image_keys"] = (FLOAT_DTYPES, (count, self.image_key_size))
        if self.num_images:
            specs["images"] = (("U8",), (count, self.num_images, self.image_bytes))
            specs["image_sizes"] = (("I64",), (count, self.num_images))
        return {f"{self.name}.{part}": spec for part, spec in specs.items()}

    def demonstration_tensors(self) -> dict[str, TensorSpec]:
        """The tensors of the demonstrations, which all edits share."""
        specs: dict[str, TensorSpec] = {}
        if self.num_stored_demonstrations:
            specs["demonstrations"] = (("U8",), (self.demonstration_bytes,))
            specs["demonstration_ends"] = (("I64",), (self.num_stored_demonstrations,))
            specs["demonstration_keys"] = (
                FLOAT_DTYPES,
                (self.num_stored_demonstrations, self.key_size),
            )
        if self.num_demonstration_images:
            specs["demonstration_images"] = (("U8",), (self.demonstration_image_bytes,))
            specs["demonstration_image_ends"] = (("I64",), (self.num_demonstration_images,))
            specs["demonstration_image_index"] = (("I64",), (self.num_stored_demonstrations,))
        return {f"{self.name}.{part}": spec for part, spec in specs.items()}

    def tensor_specs(self) -> dict[str, TensorSpec]:
        return self.per_edit_tensors() | self.demonstration_tensors()

    def shared_tensors(self) -> frozenset[str]:
        return frozenset(self.demonstration_tensors())

    def validate(self, header: Header) -> Iterator[str]:
        name = self.name
        yield from invalid_names(name, self.checkpoint_name)
        if not self.shape or min(self.shape) < 1:
            yield f"{name}: the shape must be of positive sizes, is {list(self.shape)[:4]}"
        counts = (
            self.num_images,
            self.image_bytes,
            self.num_stored_demonstrations,
            self.demonstration_bytes,
            self.image_key_size,
            self.num_demonstration_images,
            self.demonstration_image_bytes,
            self.num_demonstrations,
            self.reserved_tokens,
        )
        if min(self.num_facts, self.key_size, self.max_facts) < 1 or min(counts) < 0:
            yield f"{name}: num_facts, key_size and max_facts must be at least 1, other counts at least 0"  # noqa: E501
        if self.num_demonstration_images and not self.num_stored_demonstrations:
            yield f"{name}: images of demonstrations need demonstrations"
        num_texts = self.num_facts * (header.stack or 1)
        if len(self.facts) != num_texts:
            yield f"{name}: there must be {num_texts} facts, are {len(self.facts)}"
        if "{question}" not in self.question_template:
            yield f"{name}: `question_template` must hold {{question}}"
        if not all(
            math.isfinite(x) and -1 <= x <= 1
            for x in (self.min_similarity, self.min_image_similarity)
        ):
            yield f"{name}: min_similarity and min_image_similarity must lie from -1 to 1"
        if len(self.encoder) > 256 or not self.encoder.isprintable():
            yield f"{name}: the encoder must be printable text of at most 256 characters"
        scheme, _, rest = self.encoder.partition(":")
        if _PATH.match(scheme) or _PATH.match(rest) or ".." in rest:
            yield f"{name}: the encoder must be a name, no path of someone's machine"
        yield from self.slot_violations(header, self.num_facts, "fact")

    def layout(self) -> Prompt:
        return msgspec.structs.replace(self, facts=(), edit_slots=(), shared_slots=())

    @classmethod
    def stack(cls, entries: Sequence[Entry]) -> Prompt:
        memories = [cast(Prompt, entry) for entry in entries]
        return msgspec.structs.replace(
            memories[0],
            facts=tuple(fact for memory in memories for fact in memory.facts),
            edit_slots=tuple((memory.edit_slots or (-1,))[-1] for memory in memories),
            shared_slots=(),
        )

    def select(self, edits: Sequence[int]) -> Prompt:
        count = self.num_facts
        return msgspec.structs.replace(
            self,
            facts=tuple(self.facts[e * count + n] for e in edits for n in range(count)),
            edit_slots=tuple(self.edit_slots[e] for e in edits),
        )
