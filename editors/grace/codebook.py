"""The codebook update: add a key, expand, shrink or split radii (room for BalancEdit's radius)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from errata.functional.errors import InvalidInputError
from errata.kernels import codebook as kernel

__all__ = ["Codebook", "add_key"]


class Codebook(NamedTuple):
    """Keys with their values, radii and targets."""

    keys: Tensor  # [N I]
    values: Tensor  # [N O]
    radii: Tensor  # [N]
    targets: tuple[str, ...]  # of each key, as its record has it


def add_key(
    codebook: Codebook, key: Tensor, value: Tensor, target: str, radius: float, noise: float = 0.0
) -> tuple[Codebook, int]:
    """Add an edit to a codebook.

    With n the nearest key and d its distance, the first that holds:

        d > radius + r_n     a new key with `radius`
        same target          the same key, r_n = max(r_n, d + noise |key|)       (expand)
        d/2 <= 1e-5, or      key n, with the new value and target, since balls so small
          d/2 <= noise |key|   could not be told apart                           (take over)
        else                 a new key with radius d/2, and r_n = d/2 - 1e-5     (split)

    >>> codebook = Codebook(torch.zeros(0, 2), torch.zeros(0, 1), torch.zeros(0), ())
    >>> codebook, _ = add_key(codebook, torch.tensor([0.0, 0.0]), torch.ones(1), "a", 1.0)
    >>> codebook, number = add_key(codebook, torch.tensor([1.0, 0.0]), torch.ones(1), "b", 1.0)
    >>> number, codebook.radii
    (1, tensor([0.5000, 0.5000]))

    Args:
        codebook: The codebook so far.
        key: Input of the map at the prompt's last token, [I].
        value: Output to replace, [O].
        target: The edit's target; edits with equal targets may share a key.
        radius: Deferral radius of a new key, an L2 distance.
        noise: How far rounding may move a key, relative to its length.

    Returns:
        The new codebook and the index of the edit's key.

    Raises:
        InvalidInputError: If the key is not finite.
    """
    if not bool(key.isfinite().all()):
        raise InvalidInputError("the model's activations at the codebook's site must be finite.")
    count = len(codebook.targets)
    if not count:
        return _append_key(codebook, key, value, target, radius), 0
    nearest = kernel.nearest_key(key[None], codebook.keys)
    nearest_index, distance = int(nearest.index), float(nearest.distance)
    slack = noise * float(key.norm())
    radii = codebook.radii.clone()
    if distance > radius + float(radii[nearest_index]):
        return _append_key(codebook, key, value, target, radius), count
    if codebook.targets[nearest_index] == target:
        if distance > float(radii[nearest_index]):
            radii[nearest_index] = distance + slack
        return codebook._replace(radii=radii), nearest_index
    if distance / 2 <= max(MARGIN, slack):
        values = codebook.values.clone()
        values[nearest_index] = value
        targets = (
            *codebook.targets[:nearest_index],
            target,
            *codebook.targets[nearest_index + 1 :],
        )
        return codebook._replace(values=values, targets=targets), nearest_index
    radii[nearest_index] = distance / 2 - MARGIN
    return _append_key(codebook._replace(radii=radii), key, value, target, distance / 2), count


MARGIN = 1e-5  # between two balls that touch


def _append_key(
    codebook: Codebook, key: Tensor, value: Tensor, target: str, radius: float
) -> Codebook:
    return Codebook(
        torch.cat([codebook.keys, key[None]]),
        torch.cat([codebook.values, value[None]]),
        torch.cat([codebook.radii, codebook.radii.new_tensor([radius])]),
        (*codebook.targets, target),
    )


def _pad_codebook(codebook: Codebook, length: int) -> Codebook:
    """The book with copies of its first key, of negative radius: they lose every tie."""
    for _ in range(length - len(codebook.targets)):
        codebook = _append_key(
            codebook, codebook.keys[0], codebook.values[0], codebook.targets[0], -1.0
        )
    return codebook
