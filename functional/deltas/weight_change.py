"""A dense or low-rank entry as a weight change; inner products from the factors."""

from __future__ import annotations

from torch import Tensor

from errata.functional.errors import UnsupportedKindError
from errata.functional.kinds.common.algebra import EntryTensors
from errata.functional.kinds.dense.entry import Dense
from errata.functional.kinds.lowrank.entry import LowRank

__all__ = ["inner_product", "to_dense"]


def to_dense(part: EntryTensors) -> Tensor:
    """Return an entry as a change of the whole parameter.

    Args:
        part: A dense or low-rank entry.

    Returns:
        The change in fp32, in the parameter's layout.

    Raises:
        UnsupportedKindError: If the kind decides per input what to change.
    """
    if isinstance(part.entry, Dense):
        return part.tensors[""].float()
    if not isinstance(part.entry, LowRank):
        raise UnsupportedKindError(
            f"{part.entry.name}: a {type(part.entry).__name__.lower()} decides per input what to "
            "change, and is no change of a parameter: compare what the edited models answer."
        )
    change = part.tensors[".B"].float() @ part.tensors[".A"].float()
    return change.T if part.entry.transposed else change


def inner_product(left: EntryTensors, right: EntryTensors) -> Tensor:
    """Compute <dW, dW'> of two changes of one parameter, in fp64.

    trace((B A)ᵀ B' A') = sum((Bᵀ B') * (A A'ᵀ)): two low-rank changes are never multiplied out.

    Args:
        left: A dense or low-rank entry.
        right: Another one of the same parameter.

    Returns:
        The inner product, a scalar.

    Raises:
        UnsupportedKindError: If a kind decides per input what to change.
    """
    if isinstance(left.entry, LowRank) and isinstance(right.entry, LowRank):
        downs = left.tensors[".A"].double() @ right.tensors[".A"].double().T
        ups = left.tensors[".B"].double().T @ right.tensors[".B"].double()
        return (downs * ups).sum()
    return (to_dense(left).double() * to_dense(right).double()).sum()
