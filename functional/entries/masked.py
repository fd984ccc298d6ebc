"""Side memories of one linear map, each a sparse change of it with a gate: WISE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from .common import FLOATS, Kind, Want, misnamed

if TYPE_CHECKING:
    from ..header import Header  # noqa: TID252

__all__ = ["Activation", "Masked", "Statistic"]

Activation = Literal[
    "identity", "silu", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"
]
"""What a map's outputs go through before they are compared, by transformers' names."""

Statistic = Literal["mean", "text", "last", "easyedit"]
"""What the distances at a prompt's tokens are put together to, one number per row and memory.

mean      their mean
text      the mean of those that are no image token
last      the one at the last prompt token
easyedit  the mean, or of prompts of more than 100 tokens the largest (EasyEdit's at test time)
"""


class Masked(Kind, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="masked"):
    """Changes D_m of one linear map, zero outside a mask; each row runs with one of them or none.

    Tensors `<name>.mask` [M, ceil(out*in/8)] of bytes: bit i % 8 (lowest first) of byte i // 8 is
    position i of D_m [out, in], row-major; `<name>.values` [sum(counts)]: the values at the bits
    set, memory after memory; `<name>.thresholds` [M]. A row takes the memory with the largest
    activation among those that reach their threshold. `owners[k]` is the memory of edit k, or -1.
    """

    name: str  # the map's weight
    checkpoint: str
    shape: tuple[int, ...]  # of the weight as stored
    counts: tuple[int, ...]  # bits set in the mask of each memory
    owners: tuple[int, ...] = ()
    activation: Activation = "silu"
    statistic: Statistic = "mean"
    transposed: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the map, however its weight is stored."""
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return out, inner

    def whole(self) -> bool:
        return True

    def tensors(self) -> dict[str, Want]:
        out, inner = self.size
        return {
            f"{self.name}.mask": (("U8",), (len(self.counts), -(-out * inner // 8))),
            f"{self.name}.values": (FLOATS, (sum(self.counts),)),
            f"{self.name}.thresholds": (FLOATS, (len(self.counts),)),
        }

    def faults(self, header: Header) -> Iterator[str]:
        yield from misnamed(self.name, self.checkpoint)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
            return
        most = self.shape[0] * self.shape[1]
        if not self.counts or not all(1 <= count <= most for count in self.counts):
            yield f"{self.name}: each of one or more memories must have 1 to {most} values"
        if len(self.owners) != len(header.edits):
            yield (
                f"{self.name}: owners must name a memory for each of the {len(header.edits)} "
                f"edits, names {len(self.owners)}"
            )
        elif any(not -1 <= memory < len(self.counts) for memory in self.owners):
            yield f"{self.name}: owners must be memories from 0 to {len(self.counts) - 1}, or -1"

    def shared(self) -> Masked:
        return msgspec.structs.replace(self, owners=())

    @classmethod
    def stacked(cls, given: Sequence[Kind]) -> Masked:
        entries = [cast(Masked, entry) for entry in given]
        owners = tuple((entry.owners or (-1,))[-1] for entry in entries)
        return msgspec.structs.replace(entries[0], owners=owners)

    def picked(self, edits: Sequence[int]) -> Masked:
        return msgspec.structs.replace(self, owners=tuple(self.owners[k] for k in edits))
