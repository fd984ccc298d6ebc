"""Merging of changes of one parameter: TIES, DARE, SLERP, linear.

A method selects values of each change, may settle signs, and may divide the weighted sum by the
weights that contributed to each value:

    ties            largest     by sign   divided
    sign            all         by sign   divided
    magnitude_norm  largest     sum       divided
    magnitude       largest     sum
    dare_ties       random / p  by sign
    dare_linear     random / p  sum
    linear          all         sum       divided
    slerp           all         along the sphere, one change after another

References: TIES, Yadav et al. 2023 (arXiv 2306.01708); DARE, Yu et al. 2023 (arXiv 2311.03099);
EasyEdit `models/wise/merge/`. EasyEdit's `slerp` and `linear` interpolate between the base weight
and the *first* memory and lose the others. Its `dare_linear` does not rescale the values it keeps,
so its sum shrinks by p. Here all changes count. Legend: n changes · N values of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MergeMethod", "lerp", "merge_changes", "slerp"]

MergeMethod = Literal[
    "ties", "sign", "magnitude_norm", "magnitude", "dare_ties", "dare_linear", "linear", "slerp"
]

_LARGEST = ("ties", "magnitude_norm", "magnitude")
_RANDOM = ("dare_ties", "dare_linear")
_BY_SIGN = ("ties", "sign", "dare_ties")
_DIVIDED = ("ties", "sign", "magnitude_norm", "linear")
_COLINEAR = 0.9995


def merge_changes(
    changes: Tensor,
    weights: Sequence[float],
    method: MergeMethod,
    density: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Merge n weighted changes into one.

    Args:
        changes: Changes [n N].
        weights: Weight of each change, n of them.
        method: The algorithm. See the table of the module.
        density: Fraction of its N values that each change keeps: the largest for `ties` and
            `magnitude*`, random ones divided by the density for `dare_*`. Other methods ignore it.
        generator: Samples the values that `dare_*` keeps, on the CPU.

    Returns:
        The merged change [N].

    Example:
        >>> merge_changes(torch.tensor([[1.0, 2.0], [-3.0, 4.0]]), [0.5, 0.5], "ties").tolist()
        [-3.0, 3.0]
    """
    factors = torch.tensor(list(weights), dtype=changes.dtype, device=changes.device)[:, None]
    if method == "slerp":
        total, weight_sum = changes[0], factors[0]
        for change, factor in zip(changes[1:], factors[1:]):
            weight_sum = weight_sum + factor
            total = slerp(float(factor / weight_sum), total, change)
        return total
    if method in _LARGEST and density < 1:
        changes = torch.stack([_keep_largest(change, density) for change in changes])
    if method in _RANDOM and density < 1:
        keep_mask = (
            torch.rand(changes.shape, generator=generator, dtype=torch.float32, device="cpu")
            < density
        )
        changes = changes * keep_mask.to(changes.device) / density
    weighted = changes * factors
    counted = torch.ones_like(changes)
    if method in _BY_SIGN:
        elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        counted = (weighted.sign() == elected).to(changes.dtype)
    total = (weighted * counted).sum(0)
    if method not in _DIVIDED:
        return total
    share = (factors * counted).sum(0)
    return total / torch.where(share == 0, 1.0, share)


def slerp(t: float, first: Tensor, second: Tensor) -> Tensor:
    """Interpolate between two vectors along the sphere.

        sin((1-t) w) / sin(w) first + sin(t w) / sin(w) second,   w = the angle between them

    Almost collinear vectors (|cos w| > 0.9995) are interpolated linearly.

    Args:
        t: Position, from 0 (`first`) to 1 (`second`).
        first: Vector [N].
        second: Vector [N].

    Returns:
        The vector in between [N], in the dtype of `first`.

    Example:
        >>> slerp(0.5, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.7071, 0.7071])
    """
    one, two = first.double(), second.double()
    dot = (one * two).sum() / (one.norm() * two.norm()).clamp_min(1e-16)
    if float(dot.abs()) > _COLINEAR:
        return lerp(t, first, second)
    angle = dot.arccos()
    total = ((1 - t) * angle).sin() * one + (t * angle).sin() * two
    return (total / angle.sin()).to(first.dtype)


def lerp(t: float, first: Tensor, second: Tensor) -> Tensor:
    """Interpolate linearly: (1 - t) first + t second.

    Args:
        t: Position, from 0 (`first`) to 1 (`second`).
        first: Tensor of any shape.
        second: Tensor of the same shape.

    Returns:
        The tensor in between.
    """
    return (1 - t) * first + t * second


def _keep_largest(change: Tensor, density: float) -> Tensor:
    """Keep the fraction `density` of a change with the largest absolute values. Zero the others."""
    count = max(1, int(density * change.numel()))
    index = change.abs().topk(count).indices
    return torch.zeros_like(change).index_copy(0, index, change[index])
