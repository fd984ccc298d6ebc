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
    """Make the schedule lr * gamma^t, t the number of updates done.

    The same as torch's ExponentialLR, stepped with the optimizer.

    Args:
        lr: Learning rate of the first update.
        gamma: Factor per update.

    Returns:
        Number of updates done -> learning rate.

    Example:
        >>> exponential_schedule(0.1, 0.5)(torch.tensor(2.0))
        tensor(0.0250)
    """
    return lambda step: lr * gamma**step


def clip_grad_norm(tree: Tree, max_norm: float) -> tuple[Tree, Tensor]:
    """Scale a pytree of gradients to a Euclidean norm of at most `max_norm`.

    g = g * min(1, max_norm / (|g| + 1e-6)), as `torch.nn.utils.clip_grad_norm_`. For stacked edits,
    each with its own norm, wrap it in `torch.func.vmap`.

    Args:
        tree: The gradients.
        max_norm: Largest norm.

    Returns:
        The scaled gradients, and the norm before.

    Example:
        >>> clip_grad_norm({"w": torch.tensor([3.0, 4.0])}, 1.0)
        ({'w': tensor([0.6000, 0.8000])}, tensor(5.))
    """
    leaves = pytree.tree_leaves(tree)
    norms = [torch.linalg.vector_norm(leaf.float()) for leaf in leaves]
    total = torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (total + 1e-6)).clamp_max(1.0)
    return pytree.tree_map(lambda leaf: leaf * factor.to(leaf.dtype), tree), total


def clip_elements(tree: Tree, max_abs: float, *, inplace: bool = False) -> Tree:
    """Clip every element to [-max_abs, max_abs]: the L-infinity constraint of FT-L.

    Args:
        tree: A pytree of tensors.
        max_abs: Largest absolute value.
        inplace: Whether to overwrite the tensors.

    Returns:
        The clipped tensors.

    Example:
        >>> clip_elements({"w": torch.tensor([-2.0, 0.5])}, 1.0)
        {'w': tensor([-1.0000,  0.5000])}
    """
    if inplace:
        with torch.no_grad():
            for leaf in pytree.tree_leaves(tree):
                leaf.clamp_(-max_abs, max_abs)
        return tree
    return pytree.tree_map(lambda leaf: leaf.clamp(-max_abs, max_abs), tree)
