"""GRACE's codebook: find the nearest key, compare with its radius, replace by its value.

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
        index: [B] int64; -1 if no key is within `max_distance`.
        distance: [B] fp32, the Euclidean distance; +inf if no key is within `max_distance`, NaN if
            the query is not finite.
    """

    index: Tensor
    distance: Tensor


class KeyLookup(NamedTuple):
    """The nearest key of each query, and whether its radius covers the query.

    Attributes:
        index: [B] int64; -1 if no key is within the largest radius.
        distance: [B] fp32, the Euclidean distance.
        hit: [B] bool.
    """

    index: Tensor
    distance: Tensor
    hit: Tensor


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
    """Compute the squared length of each key, +inf for a deleted one.

    A codebook stores the result, so that a search does not read the keys a second time.

    Args:
        keys: [N D].
        is_active: [N] bool; an inactive key is never chosen. All are active by default.

    Returns:
        [N] fp32, the `norms` of `nearest_key` and `lookup_key`.

    Example:
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
    """Find the nearest key by Euclidean distance: `argmin_n |k_n - q|`, the lowest index on ties.

    The result is exact. `torch.cdist` expands `|q|^2 - 2 q.k + |k|^2`, and its distance between
    identical vectors of length 440 can be 0.5. Here the expansion only selects tiles of keys; the
    distance is a sum of squared differences. A query gets the same bits alone and in a batch.
    No gradient flows through the search.

    Args:
        query: [B D]. A query that is not finite gets index -1 and distance NaN.
        keys: [N D]; N may be 0. A key that is not finite is never chosen.
        is_active: [N] bool, False for deleted keys.
        norms: [N] `square_norms(keys, is_active)`. With it, `is_active` is not read.
        max_distance: [B] or a number; keys farther away count as absent. A query that is far
            from every key then skips the exact comparison.

    Returns:
        The nearest key of each query.

    Raises:
        ValueError: If shapes or devices do not fit.

    References:
        GRACE, Hartvigsen et al., arXiv 2211.11031; Thartvigsen/GRACE `grace/editors/grace.py`.
        It uses `torch.cdist(...).min`, in which one NaN key wins every query.

    Example:
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
    """Find the nearest key and whether it covers the query: `hit = |k_n - q| <= radii_n`.

    Only the radius of the nearest key counts, as in GRACE. A query farther from every key than the
    largest radius gets index -1 and distance +inf.

    Args:
        query: [B D].
        keys: [N D]; N may be 0.
        radii: [N]; a negative or NaN radius covers nothing.
        is_active: [N] bool, False for deleted keys.
        norms: [N] `square_norms(keys, is_active)`. With it, `is_active` is not read.

    Returns:
        The nearest key of each query, and whether it is hit.

    Raises:
        ValueError: If shapes or devices do not fit.

    Example:
        >>> query = torch.tensor([[0.9, 0.0], [9.0, 9.0]])
        >>> lookup_key(query, torch.eye(2), torch.full((2,), 0.5)).hit
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
    """Replace the hidden states of each hit by its value: plain torch, differentiable.

    `out[b, l] = values[index_b] if hit_b and token_mask[b, l] else hidden_states[b, l]`

    Args:
        hidden_states: [B L W].
        lookup: The lookup of B queries.
        values: [N W].
        token_mask: [B L] bool, the tokens that may be replaced. All by default.

    Returns:
        [B L W], in the dtype of `hidden_states`.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> lookup = lookup_key(torch.eye(2), torch.eye(2)[:1], torch.ones(1))
        >>> replace_hits(torch.zeros(2, 1, 3), lookup, torch.ones(1, 3))[:, 0]
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
