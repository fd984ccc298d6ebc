"""The nearest key in plain torch: exact, in chunks, on any device.

Legend: B queries · N keys · D width of a key · T tiles of `TILE` keys · C candidate tiles
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.kernels import custom_op

TILE = 16  # keys per tile: one fp32 minimum is kept for each
BAND = 8.0  # rounding errors of an fp32 dot product, in units of sqrt(D) * 2^-23 * |q| |k|
LIMIT = 1e38  # largest usable squared length; fp32 scores of a longer vector may overflow
SCORES = 1 << 22  # fp32 scores in memory at once
MINIMA = 1 << 25  # fp32 tile minima in memory at once
COPIED = 1 << 21  # elements of 16-bit keys widened, and of candidates rescanned, at once


def nearest(
    query: Tensor, keys: Tensor, norms: Tensor, max_distance: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the nearest usable key within `max_distance`, exact and independent of the batch.

    Tile minima of `|k|^2 - 2 q.k`, with a bound on their rounding error, select the tiles that can
    hold the minimum. Those tiles are rescanned by `sum((k - q)^2)` in float64.

    Args:
        query: [B D], any floating dtype.
        keys: [N D], any floating dtype.
        norms: [N] fp32, squared lengths; a key whose norm exceeds `LIMIT` is never chosen.
        max_distance: [B] fp32; a key farther than this counts as absent.

    Returns:
        Index [B] int64 and distance [B] fp32. A query without a key within `max_distance` gets -1
        and +inf, one that is not finite -1 and NaN.
    """
    step = max(1, MINIMA // max(1, -(-keys.shape[0] // TILE)))
    results = [
        _nearest_chunk(part, keys, norms, limit)
        for part, limit in zip(query.split(step), max_distance.split(step))
    ]
    index, distance = zip(*results)
    return torch.cat(index), torch.cat(distance)


def _nearest_chunk(
    query: Tensor, keys: Tensor, norms: Tensor, max_distance: Tensor
) -> tuple[Tensor, Tensor]:
    length = query.float().square().sum(-1)  # [B]
    is_finite = length <= LIMIT
    no_hit_distance = torch.where(is_finite, math.inf, math.nan)
    if keys.shape[0] == 0 or query.shape[0] == 0:
        return torch.full_like(length, -1, dtype=torch.int64), no_hit_distance

    query = torch.where(is_finite[:, None], query, 0)
    usable = norms <= LIMIT  # [N]
    minima = _tile_minima(query.float(), keys, norms)  # [B T]
    candidates = _within_band(minima, is_finite, length, usable, norms, max_distance, keys.shape[1])
    row, tile = candidates.nonzero(as_tuple=True)  # [C] [C]

    best = torch.full_like(length, math.inf, dtype=torch.float64)
    first = torch.full_like(length, keys.shape[0], dtype=torch.int64)
    squares, indices = _rescan(query, keys, usable, row, tile)
    best = best.scatter_reduce(0, row, squares, "amin")
    indices = torch.where(squares == best[row], indices, keys.shape[0])
    first = first.scatter_reduce(0, row, indices, "amin")

    distance = best.sqrt().float()
    is_hit = is_finite & best.isfinite() & (distance <= max_distance)
    return torch.where(is_hit, first, -1), torch.where(is_hit, distance, no_hit_distance)


def _tile_minima(query: Tensor, keys: Tensor, norms: Tensor) -> Tensor:
    """Minimum over each tile of |k|^2 - 2 q.k; NaN if the tile holds a key that is not finite."""
    scaled = -2 * query  # exact
    rows = SCORES // query.shape[0]
    if keys.dtype != torch.float32:
        rows = min(rows, COPIED // keys.shape[1])  # the widened copy stays in cache
    rows = max(1, rows // TILE) * TILE
    blocks = []
    for start in range(0, keys.shape[0], rows):
        block = keys[start : start + rows].float()
        scores = custom_op.affine(scaled, block, norms[start : start + rows])  # [B rows]
        scores = F.pad(scores, (0, -block.shape[0] % TILE), value=math.inf)
        blocks.append(scores.unflatten(1, (-1, TILE)).amin(-1))
    return torch.cat(blocks, 1)


def _within_band(
    minima: Tensor,
    is_finite: Tensor,
    length: Tensor,
    usable: Tensor,
    norms: Tensor,
    max_distance: Tensor,
    width: int,
) -> Tensor:
    """Select the tiles [B T] that can hold the nearest key within reach, whatever the rounding."""
    lowest = torch.where(minima.isnan(), math.inf, minima).amin(1)  # [B]
    longest = torch.where(usable, norms, 0).amax()
    unit = 2 * BAND * math.sqrt(width) * _roundoff()
    band = unit * (2 * length.sqrt() * longest.sqrt() + longest)
    lower_bound = lowest + length - band - unit * length  # no key is nearer than this, squared
    near = lowest.isfinite() & (max_distance >= 0) & (lower_bound <= max_distance.square())
    inside = near[:, None] & (minima <= (lowest + band)[:, None])
    return is_finite[:, None] & (inside | minima.isnan())


def _roundoff() -> float:
    # `torch.set_float32_matmul_precision` lets products round their inputs to tf32 or bf16.
    return 2.0**-23 if torch.get_float32_matmul_precision() == "highest" else 2.0**-8


def _rescan(
    query: Tensor, keys: Tensor, usable: Tensor, row: Tensor, tile: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the exact smallest squared distance of each candidate tile [C] and its index [C]."""
    squares, indices = [], []
    for rows, ids in _chunks(row, tile, keys.shape[0], keys.shape[1]):  # [c] [c TILE]
        inside = ids.clamp(max=keys.shape[0] - 1)
        difference = keys[inside].double() - query[rows][:, None].double()  # [c TILE D]
        square = difference.square_().sum(-1)
        square = torch.where((ids == inside) & usable[inside], square, math.inf)
        smallest = square.amin(1)  # [c]
        squares.append(smallest)
        indices.append(torch.where(square == smallest[:, None], ids, keys.shape[0]).amin(1))
    if not squares:
        return torch.empty_like(row, dtype=torch.float64), torch.empty_like(row)
    return torch.cat(squares), torch.cat(indices)


def _chunks(
    row: Tensor, tile: Tensor, num_keys: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    within = torch.arange(TILE, device=row.device, dtype=torch.int64)
    step = max(1, COPIED // (TILE * width))
    for rows, tiles in zip(row.split(step), tile.split(step)):
        if len(rows):
            yield rows, tiles[:, None] * TILE + within
