"""What every kind of entry is: a name, the tensors it has, and how it reads side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from ..header import Header  # noqa: TID252

__all__ = ["FLOAT_DTYPES", "PARAMETER_NAME", "ActsOn", "Entry", "TensorSpec", "invalid_names"]

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

TensorSpec = tuple[tuple[str, ...], tuple[int, ...]]
"""What a tensor must be: one of these dtypes (safetensors' names), and this shape."""

ActsOn = Literal["module", "embeddings", "prompt"]

PARAMETER_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}(\.[A-Za-z0-9_-]{1,128}){0,31}", re.ASCII)


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of a delta: what it changes, in plain data. `name` is its parameter or site.

    The last five say how an entry reads when edits stand side by side; those of a kind without
    anything per edit are these.
    """

    name: str

    def acts_on(self) -> ActsOn:
        """Where it acts first: at its site, on the embedded rows, or on the questions as read."""
        return "module"

    def needs_all_tokens(self) -> bool:
        """Whether it must see all tokens of a row where it acts, not the scored ones alone."""
        return False

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Every tensor, named `<name>` or `<name>.<part>`, without the axis of a stack."""
        raise NotImplementedError

    def validate(self, header: Header) -> Iterator[str]:
        """Everything that is wrong with the entry in itself."""
        raise NotImplementedError

    def shared_tensors(self) -> frozenset[str]:
        """Tensors that all edits of a stacked delta share: those without an edit axis there."""
        return frozenset()

    def layout(self) -> Entry:
        """What entries of a kind must agree in to be stacked: all but what is per edit."""
        return self

    @classmethod
    def stack(cls, entries: Sequence[Entry]) -> Entry:
        """The same entry of several deltas as it reads in a stacked one."""
        return entries[0].layout()

    def select(self, edits: Sequence[int]) -> Entry:
        """An entry of a stacked delta with these edits only."""
        return self

    def unstack(self, header: Header, edit: int) -> Entry:
        """An entry of a stacked delta as it reads in the delta of one of its edits."""
        return self.select([edit])


def invalid_names(*names: str) -> Iterator[str]:
    """Faults of names that are no dotted parameter names."""
    for name in names:
        if not PARAMETER_NAME.fullmatch(name):
            yield f"{name[:80]!r} must be a dotted parameter name of letters, digits, '_' and '-'"
