"""MEND's editor network: from raw gradient factors to the factors of an update.

A token's pair z = [u ; delta] of one linear map is whitened with running moments and goes through
a few residual low-rank layers, shared by all maps of one shape; a scale and a shift are the map's:

    z <- z + max(0, (U V z + b) * scale_m + shift_m)

U starts at zero, so that an untrained network is the identity. (The clamp acts in every layer, the
last included, as in the original code.)

Source: Mitchell et al. 2022, "Fast Model Editing at Scale", section 3.2 and eric-mitchell/mend
`algs/mend.py`, `nn.py`. Legend: E edits · R tokens kept · I in · O out · D width of z · M maps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from errata.functional.gradients.factors import GradientFactors

__all__ = [
    "GradientStatistics",
    "GradientTransform",
    "PackedFactors",
    "RunningMoments",
    "TransformLayer",
    "init_statistics",
    "init_transform",
    "pack_factors",
    "transform_factors",
    "update_statistics",
]

_EPS = 1e-7  # the original's


class TransformLayer(NamedTuple):
    """A residual low-rank layer, with a scale and a shift for each map that shares it."""

    up: Tensor  # [D r]
    down: Tensor  # [r D]
    bias: Tensor  # [D]
    scale: Tensor  # [M D]
    shift: Tensor  # [M D]


class GradientTransform(NamedTuple):
    """One stack of layers for u and delta together, or one for each."""

    stacks: tuple[tuple[TransformLayer, ...], ...]


class RunningMoments(NamedTuple):
    """Running mean and sum of squared deviations of the tokens seen (Welford), in float64."""

    count: Tensor  # []
    mean: Tensor  # [D]
    square: Tensor  # [D]


class GradientStatistics(NamedTuple):
    """What whitens the two factors."""

    input: RunningMoments
    output_grad: RunningMoments


class PackedFactors(NamedTuple):
    """The tokens of each edit that carry a gradient, first; zeros after them."""

    input: Tensor  # u [E R I] float32
    output_grad: Tensor  # [E R O] float32
    token_mask: Tensor  # [E R] bool


def init_transform(
    in_dim: int,
    out_dim: int,
    num_maps: int,
    *,
    rank: int,
    num_layers: int = 2,
    combine: bool = True,
    generator: torch.Generator,
) -> GradientTransform:
    """An untrained network for maps of one shape: the identity.

    Args:
        in_dim: I, inputs of the map.
        out_dim: O, outputs of the map.
        num_maps: Maps that share the network.
        rank: Rank of its layers.
        num_layers: Its depth.
        combine: One network for inputs and gradients together, not one each.
        generator: Source of V ~ N(0, 1), on the CPU.

    Returns:
        Fresh weights.
    """

    def layer(size: int) -> TransformLayer:
        r = min(rank, size)
        return TransformLayer(
            up=torch.zeros(size, r, dtype=torch.float32, device="cpu"),
            down=torch.randn(r, size, generator=generator, dtype=torch.float32, device="cpu"),
            bias=torch.zeros(size, dtype=torch.float32, device="cpu"),
            scale=torch.ones(num_maps, size, dtype=torch.float32, device="cpu"),
            shift=torch.zeros(num_maps, size, dtype=torch.float32, device="cpu"),
        )

    sizes = (in_dim + out_dim,) if combine else (in_dim, out_dim)
    return GradientTransform(tuple(tuple(layer(size) for _ in range(num_layers)) for size in sizes))


def init_statistics(in_dim: int, out_dim: int) -> GradientStatistics:
    """Moments before any token: whitening is the identity until two tokens were seen.

    Args:
        in_dim: I, inputs of the map.
        out_dim: O, outputs of the map.

    Returns:
        Empty moments.
    """

    def empty(size: int) -> RunningMoments:
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return RunningMoments(zero, zero.expand(size).clone(), zero.expand(size).clone())

    return GradientStatistics(empty(in_dim), empty(out_dim))


def pack_factors(factors: GradientFactors) -> PackedFactors:
    """Drop tokens at which u or delta is zero throughout; the rest is the rank of the update.

    Args:
        factors: Inputs u [E L I] and gradients delta [E L O] of one map.

    Returns:
        Both with R tokens each, and a mask [E R].
    """
    u, output_grad = factors.input.float(), factors.output_grad.float()
    token_mask = (u != 0).any(-1) & (output_grad != 0).any(-1)  # [E L]
    max_tokens = max(1, int(token_mask.sum(-1).max()))
    order = (~token_mask).int().argsort(dim=-1, stable=True)[:, :max_tokens]  # [E R]
    token_mask = token_mask.gather(1, order)

    def take_tokens(x: Tensor) -> Tensor:
        return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) * token_mask[..., None]

    return PackedFactors(take_tokens(u), take_tokens(output_grad), token_mask)


def update_statistics(statistics: GradientStatistics, packed: PackedFactors) -> GradientStatistics:
    """Add the tokens of a batch to the running moments (Chan et al. 1979), in one pass.

    Args:
        statistics: Moments so far.
        packed: Factors of a batch.

    Returns:
        New moments.
    """
    return GradientStatistics(
        _update_moments(statistics.input, packed.input[packed.token_mask]),
        _update_moments(statistics.output_grad, packed.output_grad[packed.token_mask]),
    )


def _update_moments(moments: RunningMoments, x: Tensor) -> RunningMoments:
    if not x.shape[0]:
        return moments
    x = x.to(moments.mean)
    count = moments.count + x.shape[0]
    mean = x.mean(0)
    mean_difference = mean - moments.mean
    return RunningMoments(
        count,
        moments.mean + mean_difference * (x.shape[0] / count),
        moments.square
        + (x - mean).square().sum(0)
        + mean_difference.square() * (moments.count * x.shape[0] / count),
    )


def transform_factors(
    transform: GradientTransform,
    statistics: GradientStatistics,
    map_index: int,
    packed: PackedFactors,
) -> PackedFactors:
    """Transform the gradient factors of one map; dropped tokens stay zero.

    Args:
        transform: The network.
        statistics: Moments for whitening.
        map_index: Index of the map among those that share the network.
        packed: Factors of a batch.

    Returns:
        Factors (u~, delta~) of the update.
    """
    u, output_grad = (
        _whiten(statistics.input, packed.input),
        _whiten(statistics.output_grad, packed.output_grad),
    )
    if len(transform.stacks) == 1:
        z = _run_layers(transform.stacks[0], map_index, torch.cat([u, output_grad], -1))
        u, output_grad = z.split([u.shape[-1], output_grad.shape[-1]], -1)
    else:
        u, output_grad = (
            _run_layers(transform.stacks[0], map_index, u),
            _run_layers(transform.stacks[1], map_index, output_grad),
        )
    token_mask = packed.token_mask[..., None]
    return PackedFactors(
        torch.where(token_mask, u, 0), torch.where(token_mask, output_grad, 0), packed.token_mask
    )


def _whiten(moments: RunningMoments, x: Tensor) -> Tensor:
    std = (moments.square / (moments.count - 1).clamp_min(1)).sqrt() + _EPS
    has_moments = moments.count >= 2
    mean = torch.where(has_moments, moments.mean, 0).to(x.dtype)
    return (x - mean) / torch.where(has_moments, std, 1).to(x.dtype)


def _run_layers(layers: tuple[TransformLayer, ...], map_index: int, z: Tensor) -> Tensor:
    for layer in layers:
        change = (z @ layer.down.mT) @ layer.up.mT + layer.bias
        z = z + (change * layer.scale[map_index] + layer.shift[map_index]).clamp_min(0)
    return z
