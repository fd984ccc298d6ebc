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

from errata.functional.factors import Factor

__all__ = [
    "Layer", "Moments", "Network", "Norms", "Packed", "network", "norms", "observe", "pack",
    "transform",
]  # fmt: skip

_EPS = 1e-7  # the original's


class Layer(NamedTuple):
    """A residual low-rank layer, with a scale and a shift for each map that shares it."""

    up: Tensor  # [D r]
    down: Tensor  # [r D]
    bias: Tensor  # [D]
    scale: Tensor  # [M D]
    shift: Tensor  # [M D]


class Network(NamedTuple):
    """One stack of layers for u and delta together, or one for each."""

    stacks: tuple[tuple[Layer, ...], ...]


class Moments(NamedTuple):
    """Running mean and sum of squared deviations of the tokens seen (Welford), in float64."""

    count: Tensor  # []
    mean: Tensor  # [D]
    square: Tensor  # [D]


class Norms(NamedTuple):
    """What whitens the two factors."""

    input: Moments
    delta: Moments


class Packed(NamedTuple):
    """The tokens of each edit that carry a gradient, first; behind them zeros."""

    input: Tensor  # u [E R I] float32
    delta: Tensor  # [E R O] float32
    keep: Tensor  # [E R] bool


def network(
    width: int,
    out: int,
    num_maps: int,
    *,
    rank: int,
    num_layers: int = 2,
    combine: bool = True,
    generator: torch.Generator,
) -> Network:
    """An untrained network for maps of [out width]: the identity. V ~ N(0, 1), drawn on the CPU."""

    def layer(size: int) -> Layer:
        r = min(rank, size)
        return Layer(
            up=torch.zeros(size, r),
            down=torch.randn(r, size, generator=generator),
            bias=torch.zeros(size),
            scale=torch.ones(num_maps, size),
            shift=torch.zeros(num_maps, size),
        )

    sizes = (width + out,) if combine else (width, out)
    return Network(tuple(tuple(layer(size) for _ in range(num_layers)) for size in sizes))


def norms(width: int, out: int) -> Norms:
    """Moments of nothing: until two tokens were seen, whitening is the identity."""

    def empty(size: int) -> Moments:
        zero = torch.zeros((), dtype=torch.float64)
        return Moments(zero, zero.expand(size).clone(), zero.expand(size).clone())

    return Norms(empty(width), empty(out))


def pack(factor: Factor) -> Packed:
    """Drop tokens at which u or delta is zero throughout: the rank of an update is what is left."""
    u, delta = factor.input.float(), factor.delta.float()
    keep = (u != 0).any(-1) & (delta != 0).any(-1)  # [E L]
    most = max(1, int(keep.sum(-1).max()))
    order = (~keep).int().argsort(dim=-1, stable=True)[:, :most]  # [E R]
    keep = keep.gather(1, order)

    def taken(x: Tensor) -> Tensor:
        return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) * keep[..., None]

    return Packed(taken(u), taken(delta), keep)


def observe(seen: Norms, packed: Packed) -> Norms:
    """Add the tokens of a batch to the running moments (Chan et al. 1979), in one pass."""
    return Norms(
        _observe(seen.input, packed.input[packed.keep]),
        _observe(seen.delta, packed.delta[packed.keep]),
    )


def _observe(seen: Moments, x: Tensor) -> Moments:
    if not x.shape[0]:
        return seen
    x = x.to(seen.mean)
    count = seen.count + x.shape[0]
    mean = x.mean(0)
    gap = mean - seen.mean
    return Moments(
        count,
        seen.mean + gap * (x.shape[0] / count),
        seen.square + (x - mean).square().sum(0) + gap.square() * (seen.count * x.shape[0] / count),
    )


def transform(net: Network, seen: Norms, number: int, packed: Packed) -> Packed:
    """(u~, delta~) of the group's map `number`; what was dropped stays zero."""
    u, delta = _white(seen.input, packed.input), _white(seen.delta, packed.delta)
    if len(net.stacks) == 1:
        z = _run(net.stacks[0], number, torch.cat([u, delta], -1))
        u, delta = z.split([u.shape[-1], delta.shape[-1]], -1)
    else:
        u, delta = _run(net.stacks[0], number, u), _run(net.stacks[1], number, delta)
    here = packed.keep[..., None]
    return Packed(torch.where(here, u, 0), torch.where(here, delta, 0), packed.keep)


def _white(seen: Moments, x: Tensor) -> Tensor:
    std = (seen.square / (seen.count - 1).clamp_min(1)).sqrt() + _EPS
    known = seen.count >= 2
    mean = torch.where(known, seen.mean, 0).to(x.dtype)
    return (x - mean) / torch.where(known, std, 1).to(x.dtype)


def _run(layers: tuple[Layer, ...], number: int, z: Tensor) -> Tensor:
    for layer in layers:
        change = (z @ layer.down.mT) @ layer.up.mT + layer.bias
        z = z + (change * layer.scale[number] + layer.shift[number]).clamp_min(0)
    return z
