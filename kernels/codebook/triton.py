"""The nearest key on a GPU: tile minima on tensor cores, then an exact scan of the few tiles left.

Legend: B queries · N keys · D width of a key · T tiles of `KEYS` keys
"""

# Triton reads a kernel as its own language and takes launch options that pyright cannot see.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from errata.kernels.codebook import ref

SCAN, SCAN_WARPS = 16, 8  # columns per step of the exact scan, and its warps
TILES = 1024  # tile minima per step of the exact scan
KEYS = 128  # keys per tile; they take the long side of the product, which needs 64 rows for wgmma
LIMIT = tl.constexpr(ref.LIMIT)
NO_KEY = tl.constexpr(2**31 - 1)


class Blocks(NamedTuple):
    """A fixed launch configuration. One chosen by timing would change bits between runs.

    Attributes:
        rows: Queries per program.
        width: Columns per step.
        num_warps: Warps per program.
        num_stages: Pipeline stages of the loads.
    """

    rows: int
    width: int
    num_warps: int
    num_stages: int


def blocks(num_rows: int, itemsize: int) -> Blocks:
    """Choose the launch configuration; it needs at most about 96 KB of shared memory.

    Args:
        num_rows: Number of queries.
        itemsize: Bytes per element of a tile in the product, 2 or more.

    Returns:
        The configuration.
    """
    if itemsize != 2:  # three tensor-core passes for fp32, and the registers for them
        return Blocks(16, 32, 4, 4) if num_rows <= 16 else Blocks(64, 32, 8, 3)
    if num_rows <= 16:
        return Blocks(16, 64, 4, 5)
    if num_rows <= 64:
        return Blocks(64, 64, 4, 4)
    return Blocks(128, 64, 8, 3)


@triton.jit
def tile_minima(
    query,
    keys,
    norms,
    minima,
    longest,
    num_rows,
    num_keys,
    width,
    num_tiles,
    query_stride,
    key_stride,
    WIDEN: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute the lowest score of each tile, `min |k|^2 - 2 q.k`, and its largest `|k|^2`.

    A key that is not usable, NaN included, never has the lowest score. The keys take the first axis
    of the product.

    Args:
        query: Pointer to [B D].
        keys: Pointer to [N D].
        norms: Pointer to [N] fp32, squared lengths.
        minima: Pointer to the output [B T] fp32.
        longest: Pointer to the output [T] fp32, the largest usable norm of each tile.
        num_rows: B.
        num_keys: N.
        width: D.
        num_tiles: T.
        query_stride: Elements between two queries.
        key_stride: Elements between two keys.
        WIDEN: Whether to multiply in fp32.
        KEYS: Keys per tile.
        ROWS: Queries per program.
        WIDTH: Columns per step.
    """  # noqa: DOC107
    program = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, ROWS)
    tile = program // row_tiles  # neighbors share a tile of keys: it is read once, then from L2
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)
    key = tile * KEYS + tl.arange(0, KEYS)
    column = tl.arange(0, WIDTH)

    norm = tl.load(norms + key, mask=key < num_keys, other=float("inf"))
    usable = norm <= LIMIT
    key_at = keys + key.to(tl.int64)[:, None] * key_stride + column[None, :]
    query_at = query + row.to(tl.int64)[:, None] * query_stride + column[None, :]
    product = tl.zeros([KEYS, ROWS], tl.float32)
    for start in range(0, width, WIDTH):
        inside = (start + column < width)[None, :]
        k = tl.load(key_at + start, mask=usable[:, None] & inside, other=0.0)
        q = tl.load(query_at + start, mask=(row < num_rows)[:, None] & inside, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
            q = q.to(tl.float32)
        product = tl.dot(k, tl.trans(q), product, input_precision="tf32x3")
    score = tl.where(usable[:, None], norm[:, None] - 2 * product, float("inf"))
    least = tl.min(score, 0)
    tl.store(minima + row.to(tl.int64) * num_tiles + tile, least, mask=row < num_rows)
    tl.store(longest + tile, tl.max(tl.where(usable, norm, 0.0), 0), mask=program % row_tiles == 0)


@triton.jit
def rescan(
    query,
    keys,
    norms,
    max_distance,
    minima,
    longest,
    index,
    distance,
    num_keys,
    width,
    num_tiles,
    query_stride,
    key_stride,
    unit,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """Find the exact nearest key of each query among the tiles within the rounding error."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    query_at = query + tl.cast(row, tl.int64) * query_stride + column
    squares = tl.zeros([WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        q = tl.load(query_at + start, mask=start + column < width, other=0.0).to(tl.float32)
        squares += q * q
    length = tl.sum(squares, 0)
    sound = length <= LIMIT

    offset = tl.arange(0, TILES)
    least = tl.full([TILES], float("inf"), tl.float32)
    most = tl.zeros([TILES], tl.float32)
    minima_at = minima + tl.cast(row, tl.int64) * num_tiles + offset
    for start in range(0, num_tiles, TILES):
        inside = start + offset < num_tiles
        least = tl.minimum(least, tl.load(minima_at + start, mask=inside, other=float("inf")))
        most = tl.maximum(most, tl.load(longest + start + offset, mask=inside, other=0.0))
    lowest = tl.min(least, 0)
    longest_norm = tl.max(most, 0)
    band = unit * (2 * tl.sqrt(tl.where(sound, length, 0.0)) * tl.sqrt(longest_norm) + longest_norm)
    limit_distance = tl.load(max_distance + row)
    lower_bound = lowest + length - band - unit * length
    near = (
        sound
        & (lowest < float("inf"))
        & (limit_distance >= 0)
        & (lower_bound <= limit_distance * limit_distance)
    )
    limit = tl.where(near, lowest + band, float("-inf"))

    best = tl.full([], float("inf"), tl.float64)
    first = tl.full([], -1, tl.int32)
    for start in range(0, num_tiles, TILES):
        inside = start + offset < num_tiles
        minimum = tl.load(minima_at + start, mask=inside, other=float("inf"))
        candidate = inside & (minimum <= limit)
        left = tl.sum(candidate.to(tl.int32), 0)
        while left > 0:
            tile_index = tl.min(tl.where(candidate, offset, TILES), 0)
            key = (start + tile_index) * KEYS + tl.arange(0, KEYS)
            norm = tl.load(norms + key, mask=key < num_keys, other=float("inf"))
            usable = norm <= LIMIT
            key_at = keys + key.to(tl.int64)[:, None] * key_stride + column[None, :]
            total = tl.zeros([KEYS], tl.float64)
            for step in range(0, width, WIDTH):
                valid = step + column < width
                k = tl.load(key_at + step, mask=usable[:, None] & valid[None, :], other=0.0)
                q = tl.load(query_at + step, mask=valid, other=0.0)
                difference = k.to(tl.float64) - q.to(tl.float64)[None, :]
                total += tl.sum(difference * difference, 1)
            total = tl.where(usable, total, float("inf"))
            smallest = tl.min(total, 0)
            lowest_key = tl.min(tl.where(total == smallest, key, NO_KEY), 0)
            better = smallest < best  # strict: tiles come in ascending order
            first = tl.where(better, lowest_key, first)
            best = tl.where(better, smallest, best)
            candidate = candidate & (offset != tile_index)
            left -= 1

    exact = tl.sqrt(best).to(tl.float32)
    found = (first >= 0) & (exact <= limit_distance)
    missed = tl.where(sound, float("inf"), float("nan"))
    tl.store(index + row, tl.where(found, first, -1).to(tl.int64))
    tl.store(distance + row, tl.where(found, exact, missed))


def nearest(
    query: Tensor, keys: Tensor, norms: Tensor, max_distance: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the nearest key as `ref.nearest` does, without waiting for the device.

    Each slice of queries with `ref.MINIMA` tile minima takes two launches.

    Args:
        query: [B D].
        keys: [N D].
        norms: [N] fp32, squared lengths.
        max_distance: [B] fp32.

    Returns:
        Index [B] int64 and distance [B] fp32, as in `ref.nearest`.
    """
    num_rows, num_keys = query.shape[0], keys.shape[0]
    index = torch.full_like(query[:, 0], -1, dtype=torch.int64)
    distance = torch.empty_like(index, dtype=torch.float32)
    if num_keys == 0 or num_rows == 0:
        return ref.nearest(query, keys, norms, max_distance)
    query, keys = (part if part.stride(1) == 1 else part.contiguous() for part in (query, keys))
    norms, max_distance = norms.contiguous(), max_distance.contiguous()
    num_tiles = triton.cdiv(num_keys, KEYS)
    longest = torch.empty_like(norms[:num_tiles])
    step = max(1, ref.MINIMA // num_tiles)
    minima = torch.empty((min(step, num_rows), num_tiles), device=norms.device, dtype=torch.float32)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        search(
            query[start:stop],
            keys,
            norms,
            max_distance[start:stop],
            minima,
            longest,
            index[start:stop],
            distance[start:stop],
        )
    return index, distance


def search(
    query: Tensor,
    keys: Tensor,
    norms: Tensor,
    max_distance: Tensor,
    minima: Tensor,
    longest: Tensor,
    index: Tensor,
    distance: Tensor,
) -> None:
    """Launch both passes over one slice of the queries.

    Args:
        query: [B D], contiguous in D.
        keys: [N D], contiguous in D.
        norms: [N] fp32, contiguous.
        max_distance: [B] fp32, contiguous.
        minima: [>= B, T] fp32, scratch memory.
        longest: [T] fp32, scratch memory.
        index: [B] int64, the output.
        distance: [B] fp32, the output.
    """
    num_rows, width = query.shape
    num_keys, num_tiles = keys.shape[0], longest.shape[0]
    interpreted = knobs.runtime.interpret  # it multiplies the bit patterns of bf16
    widen = interpreted or query.dtype != keys.dtype or keys.dtype == torch.float64
    rows, step, num_warps, num_stages = blocks(num_rows, 4 if widen else keys.element_size())
    tile_minima[(triton.cdiv(num_rows, rows) * num_tiles,)](
        query,
        keys,
        norms,
        minima,
        longest,
        num_rows,
        num_keys,
        width,
        num_tiles,
        query.stride(0),
        keys.stride(0),
        WIDEN=widen,
        KEYS=KEYS,
        ROWS=rows,
        WIDTH=step,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
    )
    rescan[(num_rows,)](
        query,
        keys,
        norms,
        max_distance,
        minima,
        longest,
        index,
        distance,
        num_keys,
        width,
        num_tiles,
        query.stride(0),
        keys.stride(0),
        2 * ref.BAND * math.sqrt(width) * 2.0**-23,
        KEYS=KEYS,
        WIDTH=SCAN,
        TILES=TILES,
        num_warps=SCAN_WARPS,
        enable_fp_fusion=True,
    )
