"""Changes of parameters: dense, and of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from errata.functional.header import FLOAT_DTYPES, Entry, TensorSpec, invalid_names

if TYPE_CHECKING:
    from errata.functional.header import Header

__all__ = ["Dense"]


class Dense(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dense"):
    """Change of a whole parameter: W' = W + d. Tensor `<name>`: the shape of the parameter."""

    name: str  # in-memory parameter name
    checkpoint_name: str  # the same parameter in the checkpoint's naming
    shape: tuple[int, ...]

    def is_weight_change(self) -> bool:
        return True

    def tensor_specs(self) -> dict[str, TensorSpec]:
        return {self.name: (FLOAT_DTYPES, self.shape)}

    def validate(self, header: Header) -> Iterator[str]:
        yield from invalid_names(self.name, self.checkpoint_name)
        if not self.shape or min(self.shape) < 1:
            yield f"{self.name}: the shape must be of positive sizes, is {list(self.shape)}"
