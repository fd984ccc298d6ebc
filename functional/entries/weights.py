"""Changes of parameters: dense, and of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from .common import FLOATS, Kind, Want, misnamed

if TYPE_CHECKING:
    from ..header import Header  # noqa: TID252

__all__ = ["Dense", "LowRank"]


class Dense(Kind, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dense"):
    """Change of a whole parameter: W' = W + d. Tensor `<name>`: the shape of the parameter."""

    name: str  # in-memory parameter name
    checkpoint: str  # the same parameter in the checkpoint's naming
    shape: tuple[int, ...]

    def tensors(self) -> dict[str, Want]:
        return {self.name: (FLOATS, self.shape)}

    def faults(self, header: Header) -> Iterator[str]:
        yield from misnamed(self.name, self.checkpoint)
        if not self.shape or min(self.shape) < 1:
            yield f"{self.name}: the shape must be of positive sizes, is {list(self.shape)}"


class LowRank(Kind, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lowrank"):
    """Low-rank change of a linear map: dW = B A, dW [out in].

    Tensors `<name>.A` [r in] and `<name>.B` [out r]; any scale is folded into B. `rows[k]` of the r
    rows belong to edit k, in order (sum == r); empty where the rank is shared by all edits.
    `transposed`: the parameter is stored [in out].
    """

    name: str
    checkpoint: str
    shape: tuple[int, ...]  # of the parameter as stored
    rank: int
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def tensors(self) -> dict[str, Want]:
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return {
            f"{self.name}.A": (FLOATS, (self.rank, inner)),
            f"{self.name}.B": (FLOATS, (out, self.rank)),
        }

    def faults(self, header: Header) -> Iterator[str]:
        yield from misnamed(self.name, self.checkpoint)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
        if self.rank < 1:
            yield f"{self.name}: the rank must be at least 1, is {self.rank}"
        if not self.rows:
            return
        if header.stack:
            yield f"{self.name}: rows must be empty in a stacked delta"
        elif len(self.rows) != len(header.edits):
            yield (
                f"{self.name}: rows must name a number of rows for each of the "
                f"{len(header.edits)} edits, names {len(self.rows)}"
            )
        elif min(self.rows) < 0 or sum(self.rows) != self.rank:
            yield f"{self.name}: rows must be counts that add up to the rank {self.rank}"

    def shared(self) -> LowRank:
        return msgspec.structs.replace(self, rows=())

    def alone(self, header: Header, edit: int) -> LowRank:
        return self if header.recursive else msgspec.structs.replace(self, rows=(self.rank,))
