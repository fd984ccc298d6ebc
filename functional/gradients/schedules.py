"""Learning-rate schedules, gradient clipping, norm constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "Schedule",
    "clip_elements",
    "clip_grad_norm",
    "exponential_schedule",
]

Tree = Any
"""A tensor, or dicts, tuples and NamedTuples of them."""

Schedule = Callable[[Tensor], Tensor]
"""Number of updates done before this one -> learning rate."""


def exponential_schedule(lr: float, gamma: float) -> Schedule:
    """lr * gamma^t at the step after t updates: torch's ExponentialLR stepped with the optimiser.

    >>> exponential_schedule(0.1, 0.5)(torch.tensor(2.0))
    tensor(0.0250)
    """
    return lambda step: lr * gamma**step


def clip_grad_norm(tree: Tree, max_norm: float) -> tuple[Tree, Tensor]:
    """Scale a pytree of gradients to a Euclidean norm of at most `max_norm`. Returns the norm too.

    g = g * min(1, max_norm / (|g| + 1e-6)), as `torch.nn.utils.clip_grad_norm_`. For stacked edits,
    each with its own norm, wrap it in `torch.func.vmap`.

    >>> clip_grad_norm({"w": torch.tensor([3.0, 4.0])}, 1.0)
    ({'w': tensor([0.6000, 0.8000])}, tensor(5.))
    """
    leaves = pytree.tree_leaves(tree)
    norms = [torch.linalg.vector_norm(leaf.float()) for leaf in leaves]
    total = torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (total + 1e-6)).clamp_max(1.0)
    return pytree.tree_map(lambda leaf: leaf * factor.to(leaf.dtype), tree), total


def clip_elements(tree: Tree, max_abs: float, *, inplace: bool = False) -> Tree:
    """Project every element to [-max_abs, max_abs]: the L-infinity constraint of FT-L.

    >>> clip_elements({"w": torch.tensor([-2.0, 0.5])}, 1.0)
    {'w': tensor([-1.0000,  0.5000])}
    """
    if inplace:
        with torch.no_grad():
            for leaf in pytree.tree_leaves(tree):
                leaf.clamp_(-max_abs, max_abs)
        return tree
    return pytree.tree_map(lambda leaf: leaf.clamp(-max_abs, max_abs), tree)
