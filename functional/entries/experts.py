"""Low-rank experts at a decoder layer's output, and the gate that chooses among them: LiveEdit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from .common import FLOATS, Kind, Want, misnamed

if TYPE_CHECKING:
    from ..header import Header  # noqa: TID252

__all__ = ["Blend", "Experts"]

Blend = Literal["query", "both"]
"""By which features chosen experts are weighed: the query's, or the query's and the vision's."""


class Experts(Kind, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="experts"):
    """Experts added to what a decoder layer gives, chosen by a row's prompt and picture.

    Each of the N experts has keys `vision_keys` [N SK+2] and `query_keys` [N SK] ([N 2SK] with
    `blend` "both"), and factors `down`, `up` [N R D]; all else reads the features of a row (S slots
    of width K each) and is shared by all edits. `owners[k]` is the expert of edit k, -1 where a
    later edit took its place. `functional/experts.py` has the arithmetic.
    """

    name: str  # a weight of the layer
    checkpoint: str
    shape: tuple[int, ...]  # of that weight as stored
    num_experts: int
    rank: int
    hidden: int  # D
    slots: int  # S
    width: int  # K
    heads: int  # H, of the cross-attentions that read features
    sentinel: int  # tokens of the sentinel picture
    sentinel_text: int  # tokens of the sentinel of rows without a picture
    owners: tuple[int, ...] = ()
    blend: Blend = "query"
    most: int = 0  # experts of one row, the heaviest; 0: all that are chosen

    def tensors(self) -> dict[str, Want]:
        count, hidden, width = self.num_experts, self.hidden, self.width
        keys, rows = self.slots * width, self.slots * self.heads
        shapes = {
            "vision_keys": (count, keys + 2),
            "query_keys": (count, keys * (2 if self.blend == "both" else 1)),
            "down": (count, self.rank, hidden),
            "up": (count, self.rank, hidden),
            "norm": (2, hidden),
            "asked.norm": (2, hidden),
            "asked.rows": (rows, hidden),
            "asked.value": (width, hidden),
            "asked.bias": (width,),
            "seen.query": (width, width),
            "seen.shift": (width,),
            "seen.key": (width, hidden),
            "seen.value": (width, hidden),
            "seen.bias": (width,),
            "query.norm": (2, hidden),
            "query.rows": (rows, hidden),
            "query.value": (width, hidden),
            "query.bias": (width,),
            "sentinel": (self.sentinel, hidden),
            "sentinel_text": (self.sentinel_text, hidden),
        }
        return {f"{self.name}.{part}": (FLOATS, shape) for part, shape in shapes.items()}

    def faults(self, header: Header) -> Iterator[str]:
        yield from misnamed(self.name, self.checkpoint)
        if not self.shape or min(self.shape) < 1:
            yield f"{self.name}: the shape must be of positive sizes, is {list(self.shape)[:4]}"
        sizes = ("num_experts", "rank", "hidden", "slots", "width", "heads", "sentinel",
                 "sentinel_text")  # fmt: skip
        small = [what for what in sizes if getattr(self, what) < 1]
        if small:
            yield f"{self.name}: {', '.join(small)} must be at least 1"
        elif self.width % self.heads:
            yield f"{self.name}: {self.heads} heads must divide the width {self.width}"
        if self.most < 0:
            yield f"{self.name}: most must be 0 or more, is {self.most}"
        if len(self.owners) != len(header.edits):
            yield (
                f"{self.name}: owners must name an expert for each of the {len(header.edits)} "
                f"edits, names {len(self.owners)}"
            )
        elif any(not -1 <= expert < self.num_experts for expert in self.owners):
            yield f"{self.name}: owners must be experts from 0 to {self.num_experts - 1}, or -1"

    def common(self) -> frozenset[str]:
        own = {f"{self.name}.{part}" for part in ("vision_keys", "query_keys", "down", "up")}
        return frozenset(self.tensors()) - own

    def shared(self) -> Experts:
        return msgspec.structs.replace(self, owners=())

    @classmethod
    def stacked(cls, given: Sequence[Kind]) -> Experts:
        pools = [cast(Experts, entry) for entry in given]
        owners = tuple((pool.owners or (-1,))[-1] for pool in pools)
        return msgspec.structs.replace(pools[0], owners=owners)

    def picked(self, edits: Sequence[int]) -> Experts:
        return msgspec.structs.replace(self, owners=tuple(self.owners[k] for k in edits))
