"""Facts and demonstrations put before a question as text: IKE's memory (and LTE's)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from .common import FLOATS, Begins, Kind, Want, misnamed

if TYPE_CHECKING:
    from ..header import Header  # noqa: TID252

__all__ = ["By", "Order", "Prompt"]

By = Literal["question", "fact"]
"""What demonstrations are retrieved by: the fact with the question asked, or the fact alone."""

Order = Literal["nearest-last", "nearest-first"]
"""In which order retrieved demonstrations stand before the fact."""


_PLACE = re.compile(r"[/~\\\\]|[A-Za-z]:[\\\\/]|file:", re.ASCII)


class Prompt(Kind, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="prompt"):
    """Texts put before a question: the facts that fit it, and demonstrations of their use.

    Tensors of a memory of N facts: `<name>.questions` [N d], unit keys of their questions;
    `<name>.pictures` [N v], unit keys of their pictures, zero without one (not there if v = 0);
    `<name>.shown` U8 [N S W] and `<name>.sizes` I64 [N S], PNG files that go before the fact,
    padded with zeros (not there if S = 0). Common to all edits, with D demonstrations:
    `<name>.demos` U8, their texts end to end, `<name>.ends` I64 [D] and `<name>.demo_keys` [D d];
    with S' pictures of theirs `<name>.demo_shown` U8, PNG files end to end,
    `<name>.demo_shown_ends` I64 [S'] and `<name>.demo_shows` I64 [D], each one's picture or -1.

    `facts` are the texts as they stand before the question, `<image>` for each picture; in a stack
    those of all edits, memory after memory. `owners[k]` is the fact of edit k, -1 for none. `name`
    is the token embedding, which says what base this is for.
    """

    name: str
    checkpoint: str
    shape: tuple[int, ...]
    facts: tuple[str, ...] = ()
    num_facts: int  # N, of each memory
    owners: tuple[int, ...] = ()
    ask: str = "{question}"  # how the question follows
    encoder: str  # of questions: see `encoders.py`
    width: int  # d
    look: int = 0  # v
    least: float = -1.0  # similarity of questions below which a fact is not put in
    least_look: float = -1.0  # the same of pictures
    most: int = 1  # facts put in
    k: int = 0  # demonstrations put in
    by: By = "question"
    order: Order = "nearest-last"
    room: int = 0  # tokens of the context that demonstrations leave free
    num_shown: int = 0  # S
    shown_bytes: int = 0  # W
    num_demos: int = 0  # D
    demo_bytes: int = 0
    num_demo_shown: int = 0  # S'
    demo_shown_bytes: int = 0

    def begins(self) -> Begins:
        return "read"

    def memory(self) -> dict[str, Want]:
        """The tensors that each edit has of its own."""
        count = self.num_facts
        wanted: dict[str, Want] = {"questions": (FLOATS, (count, self.width))}
        if self.look:
            wanted["pictures"] = (FLOATS, (count, self.look))
        if self.num_shown:
            wanted["shown"] = (("U8",), (count, self.num_shown, self.shown_bytes))
            wanted["sizes"] = (("I64",), (count, self.num_shown))
        return {f"{self.name}.{part}": want for part, want in wanted.items()}

    def demos(self) -> dict[str, Want]:
        """The tensors of the demonstrations, which all edits share."""
        wanted: dict[str, Want] = {}
        if self.num_demos:
            wanted["demos"] = (("U8",), (self.demo_bytes,))
            wanted["ends"] = (("I64",), (self.num_demos,))
            wanted["demo_keys"] = (FLOATS, (self.num_demos, self.width))
        if self.num_demo_shown:
            wanted["demo_shown"] = (("U8",), (self.demo_shown_bytes,))
            wanted["demo_shown_ends"] = (("I64",), (self.num_demo_shown,))
            wanted["demo_shows"] = (("I64",), (self.num_demos,))
        return {f"{self.name}.{part}": want for part, want in wanted.items()}

    def tensors(self) -> dict[str, Want]:
        return self.memory() | self.demos()

    def common(self) -> frozenset[str]:
        return frozenset(self.demos())

    def faults(self, header: Header) -> Iterator[str]:
        name = self.name
        yield from misnamed(name, self.checkpoint)
        if not self.shape or min(self.shape) < 1:
            yield f"{name}: the shape must be of positive sizes, is {list(self.shape)[:4]}"
        counts = (self.num_shown, self.shown_bytes, self.num_demos, self.demo_bytes, self.look,
                  self.num_demo_shown, self.demo_shown_bytes, self.k, self.room)  # fmt: skip
        if min(self.num_facts, self.width, self.most) < 1 or min(counts) < 0:
            yield f"{name}: num_facts, width and most must be at least 1, other counts at least 0"
        if self.num_demo_shown and not self.num_demos:
            yield f"{name}: pictures of demonstrations need demonstrations"
        want = self.num_facts * (header.stack or 1)
        if len(self.facts) != want:
            yield f"{name}: there must be {want} facts, are {len(self.facts)}"
        if "{question}" not in self.ask:
            yield f"{name}: `ask` must hold {{question}}"
        if not all(math.isfinite(x) and -1 <= x <= 1 for x in (self.least, self.least_look)):
            yield f"{name}: least and least_look must lie from -1 to 1"
        if len(self.encoder) > 256 or not self.encoder.isprintable():
            yield f"{name}: the encoder must be printable text of at most 256 characters"
        scheme, _, place = self.encoder.partition(":")
        if _PLACE.match(scheme) or _PLACE.match(place) or ".." in place:
            yield f"{name}: the encoder must be a name, no path of someone's machine"
        if len(self.owners) != len(header.edits):
            yield (
                f"{name}: owners must name a fact for each of the {len(header.edits)} edits, "
                f"names {len(self.owners)}"
            )
        elif any(not -1 <= fact < self.num_facts for fact in self.owners):
            yield f"{name}: owners must be facts from 0 to {self.num_facts - 1}, or -1"

    def shared(self) -> Prompt:
        return msgspec.structs.replace(self, facts=(), owners=())

    @classmethod
    def stacked(cls, given: Sequence[Kind]) -> Prompt:
        memories = [cast(Prompt, entry) for entry in given]
        return msgspec.structs.replace(
            memories[0],
            facts=tuple(fact for memory in memories for fact in memory.facts),
            owners=tuple((memory.owners or (-1,))[-1] for memory in memories),
        )

    def picked(self, edits: Sequence[int]) -> Prompt:
        count = self.num_facts
        return msgspec.structs.replace(
            self,
            facts=tuple(self.facts[e * count + n] for e in edits for n in range(count)),
            owners=tuple(self.owners[e] for e in edits),
        )
