"""Merging changes of one parameter into one: TIES, DARE, SLERP, linear.

Each method is a way to thin out the changes, a way to settle signs, and whether the sum is divided
by the weights that came through:

    ties            largest     by sign   divided
    sign            all         by sign   divided
    magnitude_norm  largest     sum       divided
    magnitude       largest     sum
    dare_ties       random / p  by sign
    dare_linear     random / p  sum
    linear          all         sum       divided
    slerp           all         along the sphere, one change after another

Sources: TIES, Yadav et al. 2023 (arXiv 2306.01708); DARE, Yu et al. 2023 (arXiv 2311.03099);
EasyEdit `models/wise/merge/`. There `slerp` and `linear` go from the base's weight to the *first*
memory and lose the others, and `dare_linear` does not rescale what it keeps, so that its sum
shrinks by p; here all changes count. Legend: n changes · N values of each.
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
    """One change [N] in place of n weighted ones [n N], by `method`.

    `density`: the share of all N values that `ties`, `magnitude*` (the largest) and `dare_*` (drawn
    by `generator`, and divided by the density) keep of each.

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
        keep_mask = torch.rand(changes.shape, generator=generator) < density
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
    """From `first` (t=0) to `second` (t=1) along the sphere; straight where they are colinear.

        sin((1-t) w) / sin(w) first + sin(t w) / sin(w) second,   w = the angle between them

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
    """(1 - t) first + t second."""
    return (1 - t) * first + t * second


def _keep_largest(change: Tensor, density: float) -> Tensor:
    """The largest values of a change, as many as the share `density` of all; zeros elsewhere."""
    count = max(1, int(density * change.numel()))
    index = change.abs().topk(count).indices
    return torch.zeros_like(change).index_copy(0, index, change[index])
