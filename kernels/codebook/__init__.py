"""GRACE's codebook: the nearest key, the hit within its radius, the value that takes its place.

Legend: B queries · N keys · D width of a key · L tokens · W width of a value
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from errata.kernels import custom_op
from errata.kernels.codebook import ref

__all__ = ["KeyLookup", "Nearest", "lookup_key", "nearest_key", "replace_hits", "square_norms"]


class Nearest(NamedTuple):
    """The nearest key of each query.

    Attributes:
        index: [B] int64, -1 for none.
        distance: [B] fp32, the Euclidean distance.
    """

    index: Tensor  # [B] int64, -1: none within reach
    distance: Tensor  # [B] fp32, +inf: none within reach, NaN: the query is not finite


class KeyLookup(NamedTuple):
    """The nearest key of each query, and whether its radius covers the query.

    Attributes:
        index: [B] int64, -1 for none.
        distance: [B] fp32, the Euclidean distance.
        hit: [B] bool.
    """

    index: Tensor  # [B] int64, -1: none
    distance: Tensor  # [B] fp32
    hit: Tensor  # [B] bool


def _fake(
    query: Tensor, keys: Tensor, norms: Tensor, max_distance: Tensor
) -> tuple[Tensor, Tensor]:
    rows = query.shape[:1]
    return (
        query.new_empty(rows, dtype=torch.int64),
        query.new_empty(rows, dtype=torch.float32),
    )


_nearest_op = custom_op.register(
    "nearest", ref.nearest, _fake, twin="errata.kernels.codebook.triton", row_arguments=(0, 3)
)


def square_norms(keys: Tensor, is_active: Tensor | None = None) -> Tensor:
    """Squared lengths of the keys, +inf for a deleted one: what a codebook keeps beside them.

    Args:
        keys: [N D].
        is_active: [N] bool; an inactive key is never chosen. All are, by default.

    Returns:
        [N] fp32. Pass it as `norms`, and a search does not read the keys a second time.

    >>> square_norms(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([True, False]))
    tensor([25., inf])
    """
    norms = torch.linalg.vector_norm(keys.detach(), dim=-1, dtype=torch.float32).square()
    return norms if is_active is None else torch.where(is_active, norms, math.inf)


def nearest_key(
    query: Tensor,
    keys: Tensor,
    *,
    is_active: Tensor | None = None,
    norms: Tensor | None = None,
    max_distance: Tensor | float = math.inf,
) -> Nearest:
    """The nearest key by Euclidean distance: `argmin_n |k_n - q|`, the lowest index on ties.

    Exact, unlike `torch.cdist`, whose expansion `|q|^2 - 2 q.k + |k|^2` puts identical vectors of
    length 440 half a unit apart: the expansion only selects tiles, the distance is a sum of
    squared differences. The result of a query has the same bits alone and in a batch.
    Discrete, so nothing is differentiated through it.

    Args:
        query: [B D]. One that is not finite gets index -1 and distance NaN.
        keys: [N D], N from 0. One that is not finite is never chosen.
        is_active: [N] bool, False for deleted keys.
        norms: [N] `square_norms(keys, is_active)`, if at hand; then `is_active` is not read.
        max_distance: [B] or a number; farther keys count as absent. It spares queries that are far
            from every key the exact comparison.

    Returns:
        The nearest key of each query.

    Raises:
        ValueError: shapes or devices that do not fit.

    After `torch.cdist(...).min` in GRACE (Hartvigsen et al., arXiv 2211.11031; Thartvigsen/GRACE
    `grace/editors/grace.py`), which lets one NaN key win every query.

    >>> nearest_key(torch.tensor([[0.9, 0.0]]), torch.eye(2)).index
    tensor([0])
    """
    problems = [] if query.ndim == 2 else [f"query must be [B D], got {list(query.shape)}"]
    if keys.ndim != 2 or keys.shape[-1] != query.shape[-1]:
        problems.append(f"keys must be [N {query.shape[-1]}], got {list(keys.shape)}")
    for name, tensor in (("is_active", is_active), ("norms", norms)):
        if tensor is not None and tensor.shape != keys.shape[:1]:
            problems.append(f"{name} must be [{keys.shape[0]}], got {list(tensor.shape)}")
    problems += custom_op.device_mismatches("nearest_key", query=query, keys=keys, norms=norms)
    custom_op.raise_if_invalid("nearest_key", problems)

    norms = square_norms(keys, is_active) if norms is None else norms
    if not isinstance(max_distance, Tensor):
        max_distance = torch.full_like(query[:, 0], max_distance, dtype=torch.float32)
    max_distance = max_distance.detach().float().expand(query.shape[:1])
    return Nearest(
        *_nearest_op(query.detach(), keys.detach(), norms.detach().float(), max_distance)
    )


def lookup_key(
    query: Tensor,
    keys: Tensor,
    radii: Tensor,
    *,
    is_active: Tensor | None = None,
    norms: Tensor | None = None,
) -> KeyLookup:
    """The nearest key and whether it covers the query: `hit = |k_n - q| <= radii_n`.

    Only the radius of the *nearest* key counts, as in GRACE. A query that no radius can reach
    comes back with index -1 and distance +inf.

    Args:
        query: [B D].
        keys: [N D], N from 0.
        radii: [N]; a negative or NaN radius covers nothing.
        is_active: [N] bool, False for deleted keys.
        norms: [N] `square_norms(keys, is_active)`, if at hand.

    Returns:
        The nearest key of each query, and whether it is hit.

    Raises:
        ValueError: shapes or devices that do not fit.

    >>> lookup_key(torch.tensor([[0.9, 0.0], [9.0, 9.0]]), torch.eye(2), torch.full((2,), 0.5)).hit
    tensor([ True, False])
    """
    if radii.shape != keys.shape[:1]:
        custom_op.raise_if_invalid(
            "lookup_key", [f"radii must be [{keys.shape[0]}], got {list(radii.shape)}"]
        )
    radii = radii.detach().float().nan_to_num(nan=-1.0, posinf=math.inf, neginf=-1.0)
    if keys.shape[0] == 0:
        index, distance = nearest_key(query, keys, norms=norms)
        return KeyLookup(index, distance, torch.zeros_like(index, dtype=torch.bool))
    max_distance = radii.amax().expand(query.shape[:1])
    index, distance = nearest_key(
        query, keys, is_active=is_active, norms=norms, max_distance=max_distance
    )
    return KeyLookup(index, distance, (index >= 0) & (distance <= radii[index.clamp(min=0)]))


def replace_hits(
    hidden_states: Tensor, lookup: KeyLookup, values: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """Put the value of each hit in place of the hidden states: plain torch, differentiable.

    `out[b, l] = values[index_b] if hit_b and token_mask[b, l] else hidden_states[b, l]`

    Args:
        hidden_states: [B L W].
        lookup: The hits of B queries.
        values: [N W].
        token_mask: [B L] bool, the tokens that may be replaced. All, by default.

    Returns:
        [B L W], of the dtype of `hidden_states`.

    >>> found = lookup_key(torch.eye(2), torch.eye(2)[:1], torch.ones(1))
    >>> replace_hits(torch.zeros(2, 1, 3), found, torch.ones(1, 3))[:, 0]
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    problems = (
        []
        if hidden_states.ndim == 3
        else [f"hidden_states must be [B L W], got {list(hidden_states.shape)}"]
    )
    if values.ndim != 2 or values.shape[-1] != hidden_states.shape[-1]:
        problems.append(f"values must be [N {hidden_states.shape[-1]}], got {list(values.shape)}")
    if token_mask is not None and token_mask.shape != hidden_states.shape[:2]:
        problems.append(
            f"token_mask must be {list(hidden_states.shape[:2])}, got {list(token_mask.shape)}"
        )
    custom_op.raise_if_invalid("replace_hits", problems)
    if values.shape[0] == 0:
        return hidden_states
    hit = lookup.hit[:, None] if token_mask is None else lookup.hit[:, None] & token_mask  # [B L]
    chosen = values[lookup.index.clamp(min=0)].to(hidden_states.dtype)  # [B W]
    return torch.where(hit[..., None], chosen[:, None], hidden_states)
