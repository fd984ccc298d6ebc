"""Values in place of a linear map's output: GRACE's codebook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from errata.functional.header import FLOAT_DTYPES, SlotEntry, TensorSpec, invalid_names

if TYPE_CHECKING:
    from errata.functional.header import Header  # noqa: TID252

__all__ = ["Codebook", "Replacement"]

Replacement = Literal["last", "prompt", "all"]
"""Which tokens a codebook's value replaces, with t the prompt's last: t, those before t, or both.

Tokens of the answer are never replaced: what is generated token by token is what one pass gives.
"""


class Codebook(SlotEntry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="codebook"):
    """Values that replace a linear map's output where its input is near a key.

    Tensors `<name>.keys` [N in], `<name>.values` [N out], `<name>.radii` [N]. With q the map's
    input at the row's last prompt token and n the nearest key, the output there is values[n] if
    |keys[n] - q| <= radii[n]. `edit_slots[k]` is the key of edit k, -1 where a later edit
    replaced it.
    """

    name: str  # the map's weight
    checkpoint_name: str
    shape: tuple[int, ...]  # of the weight as stored
    num_keys: int
    replacement: Replacement = "last"
    transposed: bool = False

    def tensor_specs(self) -> dict[str, TensorSpec]:
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return {
            f"{self.name}.keys": (FLOAT_DTYPES, (self.num_keys, inner)),
            f"{self.name}.values": (FLOAT_DTYPES, (self.num_keys, out)),
            f"{self.name}.radii": (FLOAT_DTYPES, (self.num_keys,)),
        }

    def validate(self, header: Header) -> Iterator[str]:
        yield from invalid_names(self.name, self.checkpoint_name)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
        if self.num_keys < 1:
            yield f"{self.name}: there must be at least 1 key, are {self.num_keys}"
        yield from self.slot_violations(header, self.num_keys, "key")
