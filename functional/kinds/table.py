"""`KINDS`: entry class -> (apply, algebra), written out as one literal table."""

from __future__ import annotations

from typing import Any

from errata.functional.errors import UnsupportedKindError
from errata.functional.kinds.codebook.apply import _apply_codebook
from errata.functional.kinds.codebook.entry import Codebook
from errata.functional.kinds.common.algebra import Algebra
from errata.functional.kinds.common.patch import ApplyEntry
from errata.functional.kinds.dense.apply import _apply_dense
from errata.functional.kinds.dense.entry import Dense
from errata.functional.kinds.experts.apply import expert_hook
from errata.functional.kinds.experts.entry import Experts
from errata.functional.kinds.lowrank.apply import _apply_lowrank
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.kinds.masked.apply import apply_masked as masked_change
from errata.functional.kinds.masked.entry import Masked
from errata.functional.kinds.prompt.apply import apply
from errata.functional.kinds.prompt.entry import Prompt
from errata.functional.kinds.scope.apply import apply_scope
from errata.functional.kinds.scope.entry import Scope

__all__ = ["KINDS", "algebra", "register"]

KINDS: dict[type, ApplyEntry] = {
    Codebook: _apply_codebook,
    Dense: _apply_dense,
    Experts: expert_hook,
    LowRank: _apply_lowrank,
    Masked: masked_change,
    Prompt: apply,
    Scope: apply_scope,
}
"""Kind of entry -> the one function that says what it does. A new kind is a line here."""


_KINDS: dict[type, Algebra] = {}


def register(kind: type, operations: Algebra) -> None:
    """Enrol a kind of entry in the algebra."""
    _KINDS[kind] = operations


def algebra(entry: Any) -> Algebra:
    """The operations of an entry's kind. Raises KindUnsupported for a kind that has none."""
    if type(entry) not in _KINDS:
        raise UnsupportedKindError(
            f"deltas of kind {type(entry).__name__.lower()!r} have no algebra: "
            "apply them one after another with `bind` instead."
        )
    return _KINDS[type(entry)]
