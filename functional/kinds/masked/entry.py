"""Side memories of one linear map, each a sparse change of it with a gate: WISE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from errata.functional.header import FLOAT_DTYPES, SlotEntry, TensorSpec, invalid_names

if TYPE_CHECKING:
    from errata.functional.header import Header  # noqa: TID252

__all__ = ["Activation", "GateStatistic", "Masked"]

Activation = Literal[
    "identity", "silu", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"
]
"""What a map's outputs go through before they are compared, by transformers' names."""

GateStatistic = Literal["mean", "text", "last", "easyedit"]
"""What the distances at a prompt's tokens are put together to, one number per row and memory.

mean      their mean
text      the mean of those that are no image token
last      the one at the last prompt token
easyedit  the mean, or of prompts of more than 100 tokens the largest (EasyEdit's at test time)
"""


class Masked(SlotEntry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="masked"):
    """Changes D_m of one linear map, zero outside a mask; each row uses one of them or none.

    Tensors `<name>.mask` [M, ceil(out*in/8)] of bytes: bit i % 8 (lowest first) of byte i // 8 is
    position i of D_m [out, in], row-major; `<name>.values` [sum(counts)]: the values at the bits
    set, memory after memory; `<name>.thresholds` [M]. A row uses the memory with the largest
    activation among those that reach their threshold. `edit_slots[k]` is the memory of edit k, or
    -1.
    """

    name: str  # the map's weight
    checkpoint_name: str
    shape: tuple[int, ...]  # of the weight as stored
    num_values: tuple[int, ...]  # bits set in the mask of each memory
    activation: Activation = "silu"
    gate_statistic: GateStatistic = "mean"
    transposed: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the map, however its weight is stored."""
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return out, inner

    def needs_all_tokens(self) -> bool:
        return True

    def tensor_specs(self) -> dict[str, TensorSpec]:
        out, inner = self.size
        return {
            f"{self.name}.mask": (("U8",), (len(self.num_values), -(-out * inner // 8))),
            f"{self.name}.values": (FLOAT_DTYPES, (sum(self.num_values),)),
            f"{self.name}.thresholds": (FLOAT_DTYPES, (len(self.num_values),)),
        }

    def validate(self, header: Header) -> Iterator[str]:
        yield from invalid_names(self.name, self.checkpoint_name)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
            return
        max_values = self.shape[0] * self.shape[1]
        if not self.num_values or not all(1 <= count <= max_values for count in self.num_values):
            yield f"{self.name}: each of one or more memories must have 1 to {max_values} values"
        yield from self.slot_violations(header, len(self.num_values), "memory")
