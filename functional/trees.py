"""Algebra on dicts of tensors: the change of a model is a vector, whatever its parts are called.

Every function returns new tensors and leaves its arguments alone; two dicts must have the same
names (a missing name is a KeyError, our own bug, not a user's).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["add", "dot", "lerp", "norm", "scale", "select", "stack", "sub", "unstack"]

Tree = Mapping[str, Tensor]


def add(a: Tree, b: Tree) -> dict[str, Tensor]:
    """a + b, name by name.

    >>> add({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)})
    {'w': tensor(3.)}
    """
    _same(a, b)
    return {name: a[name] + b[name] for name in a}


def sub(a: Tree, b: Tree) -> dict[str, Tensor]:
    """a - b, name by name."""
    _same(a, b)
    return {name: a[name] - b[name] for name in a}


def scale(a: Tree, factor: float | Tensor) -> dict[str, Tensor]:
    """factor * a."""
    return {name: tensor * factor for name, tensor in a.items()}


def lerp(a: Tree, b: Tree, weight: float) -> dict[str, Tensor]:
    """(1 - weight) * a + weight * b.

    >>> lerp({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, 0.25)
    {'w': tensor(1.5000)}
    """
    _same(a, b)
    return {name: torch.lerp(a[name], b[name], weight) for name in a}


def dot(a: Tree, b: Tree) -> Tensor:
    """sum over names and elements of a * b, in fp32: a scalar.

    >>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
    tensor(11.)
    """
    _same(a, b)
    parts = [(a[name].float() * b[name].float()).sum() for name in a]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def norm(a: Tree) -> Tensor:
    """sqrt(dot(a, a)): the Euclidean norm of all elements together.

    >>> norm({"v": torch.tensor([3.0]), "w": torch.tensor([4.0])})
    tensor(5.)
    """
    parts = [torch.linalg.vector_norm(tensor.float()) for tensor in a.values()]
    return torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())


def select(a: Tree, names: Iterable[str]) -> dict[str, Tensor]:
    """The entries of those names, in the order of `names`."""
    return {name: a[name] for name in names}


def stack(trees: Sequence[Tree]) -> dict[str, Tensor]:
    """Dicts of one layout as one dict with a new leading axis.

    >>> stack([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])["w"].shape
    torch.Size([2, 2])
    """
    for tree in trees[1:]:
        _same(trees[0], tree)
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def unstack(tree: Tree) -> list[dict[str, Tensor]]:
    """The inverse of `stack`: one dict of views per index of the leading axis."""
    sizes = {tensor.shape[0] for tensor in tree.values()}
    assert len(sizes) <= 1, f"leading axes differ: {sorted(sizes)}"
    size = sizes.pop() if sizes else 0
    return [{name: tensor[i] for name, tensor in tree.items()} for i in range(size)]


def _same(a: Tree, b: Tree) -> None:
    assert a.keys() == b.keys(), f"names differ: {sorted(a.keys() ^ b.keys())[:3]}"
