"""Values in place of a linear map's output: GRACE's codebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from .common import FLOATS, Kind, Want, misnamed

if TYPE_CHECKING:
    from ..header import Header  # noqa: TID252

__all__ = ["Codebook", "Where"]

Where = Literal["last", "prompt", "all"]
"""Which tokens a codebook's value replaces, with t the prompt's last: t, those before t, or both.

Tokens of the answer are never replaced: what is generated token by token is what one pass gives.
"""


class Codebook(Kind, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="codebook"):
    """Values that take the place of a linear map's output where its input comes near a key.

    Tensors `<name>.keys` [N in], `<name>.values` [N out], `<name>.radii` [N]. With q the map's
    input at the row's last prompt token and n the nearest key, the output there is values[n] if
    |keys[n] - q| <= radii[n]. `owners[k]` is the key of edit k, -1 where a later edit took it over.
    """

    name: str  # the map's weight
    checkpoint: str
    shape: tuple[int, ...]  # of the weight as stored
    num_keys: int
    owners: tuple[int, ...] = ()
    where: Where = "last"
    transposed: bool = False

    def tensors(self) -> dict[str, Want]:
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return {
            f"{self.name}.keys": (FLOATS, (self.num_keys, inner)),
            f"{self.name}.values": (FLOATS, (self.num_keys, out)),
            f"{self.name}.radii": (FLOATS, (self.num_keys,)),
        }

    def faults(self, header: Header) -> Iterator[str]:
        yield from misnamed(self.name, self.checkpoint)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
        if self.num_keys < 1:
            yield f"{self.name}: there must be at least 1 key, are {self.num_keys}"
        if len(self.owners) != len(header.edits):
            yield (
                f"{self.name}: owners must name a key for each of the {len(header.edits)} edits, "
                f"names {len(self.owners)}"
            )
        elif any(not -1 <= key < self.num_keys for key in self.owners):
            yield f"{self.name}: owners must be keys from 0 to {self.num_keys - 1}, or -1"

    def shared(self) -> Codebook:
        return msgspec.structs.replace(self, owners=())

    @classmethod
    def stacked(cls, given: Sequence[Kind]) -> Codebook:
        books = [cast(Codebook, entry) for entry in given]
        owners = tuple((book.owners or (-1,))[-1] for book in books)
        return msgspec.structs.replace(books[0], owners=owners)

    def picked(self, edits: Sequence[int]) -> Codebook:
        return msgspec.structs.replace(self, owners=tuple(self.owners[k] for k in edits))
