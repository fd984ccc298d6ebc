"""Low-rank products per row of a batch on a GPU: input to ranks, ranks to output.

A row has slots, each with an expert and its weight for all tokens of the row. An expert layer has
many slots per row, a batch of edits has one.
Legend: B rows · L tokens · I, O input and output widths · M experts · S slots · R rank
"""

# Triton reads a kernel as its own language and takes launch options that pyright cannot see.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INNER = 1 << 28  # rank activations [B, L, S R] in memory at once


class Blocks(NamedTuple):
    """A fixed launch configuration, shared by the two products.

    Attributes:
        tokens: Tokens per program.
        columns: (slot, rank) columns per program of `shrink`.
        depth: Input columns per step of `shrink`.
        step: (slot, rank) columns per step of `expand`.
        outputs: Output columns per program of `expand`.
        num_warps: Warps per program.
    """

    tokens: int
    columns: int
    depth: int
    step: int
    outputs: int
    num_warps: int


def blocks(num_tokens: int, num_columns: int, widen: bool) -> Blocks:
    """Choose the launch configuration, with smaller steps in fp32, which needs more registers.

    Args:
        num_tokens: L.
        num_columns: Slots times ranks.
        widen: Whether the products are in fp32.

    Returns:
        The configuration.
    """
    tokens = 64 if num_tokens >= 64 else 16
    columns = 64 if num_columns >= 64 else 16
    if widen:
        return Blocks(tokens, columns, 32, min(columns, 32), 64, 8 if tokens == 64 else 4)
    return Blocks(tokens, columns, 64, columns, 128, 4)


@triton.jit
def shrink(
    x,
    moments,
    gamma,
    beta,
    down,
    ids,
    weights,
    count,
    lengths,
    inner,
    num_tokens,
    width,
    num_slots,
    first_slot,
    last_slot,
    x_row_stride,
    x_token_stride,
    down_stride,
    rank_stride,
    RANK: tl.constexpr,
    NORMED: tl.constexpr,
    SHIFTED: tl.constexpr,
    RELU: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute `inner[b, l, (s, r)] = w_s act(x_l . A_s,r)`; a column is one rank of one slot."""
    row = tl.cast(tl.program_id(2), tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = first_slot + column // RANK
    filled = tl.minimum(tl.load(count + row), last_slot)
    length = tl.load(lengths + row)
    if (first_slot + tl.program_id(1) * COLUMNS // RANK < filled) & (
        tl.program_id(0) * TOKENS < length
    ):
        live = slot < filled
        expert = tl.load(ids + row * num_slots + slot, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights + row * num_slots + slot, mask=live, other=0.0)
        present = token < length
        depth = tl.arange(0, WIDTH)
        x_at = x + row * x_row_stride + token.to(tl.int64)[:, None] * x_token_stride
        down_at = down + (expert * down_stride + (column % RANK) * rank_stride)[:, None]
        if NORMED:
            moment = moments + 2 * (row * num_tokens + token)
            mean = tl.load(moment, mask=present, other=0.0)
            rstd = tl.load(moment + 1, mask=present, other=0.0)
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in range(0, width, WIDTH):
            at = start + depth
            valid = (at < width)[None, :]
            value = tl.load(x_at + at[None, :], mask=present[:, None] & valid, other=0.0)
            factor = tl.load(down_at + at[None, :], mask=live[:, None] & valid, other=0.0)
            if NORMED:
                scale = tl.load(gamma + at, mask=at < width, other=0.0).to(tl.float32)
                value = (value.to(tl.float32) - mean[:, None]) * rstd[:, None] * scale[None, :]
                if SHIFTED:
                    shift = tl.load(beta + at, mask=at < width, other=0.0).to(tl.float32)
                    value += shift[None, :]
            if WIDEN:
                value = value.to(tl.float32)
                factor = factor.to(tl.float32)
            else:
                value = value.to(factor.dtype)
            total = tl.dot(value, tl.trans(factor), total, input_precision="tf32x3")
        if RELU:  # tl.maximum would drop a NaN
            total = tl.where(total < 0, 0.0, total)
        inner_stride = tl.cast((last_slot - first_slot) * RANK, tl.int64)
        inner_at = inner + (row * num_tokens + token)[:, None] * inner_stride
        tl.store(
            inner_at + column[None, :],
            total * weight[None, :],
            mask=present[:, None] & live[None, :],
        )


@triton.jit
def expand(
    base,
    inner,
    up,
    ids,
    count,
    lengths,
    out,
    num_tokens,
    width,
    num_slots,
    first_slot,
    last_slot,
    base_row_stride,
    base_token_stride,
    up_stride,
    rank_stride,
    width_stride,
    RANK: tl.constexpr,
    BASED: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute `out[b, l] = base[b, l] + sum over (s, r) of inner[b, l, (s, r)] B_s,r`."""
    row = tl.cast(tl.program_id(2), tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    filled = tl.minimum(tl.load(count + row), last_slot)
    num_columns = tl.cast((filled - first_slot) * RANK, tl.int32)
    present = token < tl.load(lengths + row)
    inner_stride = tl.cast((last_slot - first_slot) * RANK, tl.int64)
    inner_at = inner + (row * num_tokens + token)[:, None] * inner_stride
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        live = column < num_columns
        slot = first_slot + column // RANK
        expert = tl.load(ids + row * num_slots + slot, mask=live, other=0).to(tl.int64)
        up_at = up + (expert * up_stride + (column % RANK) * rank_stride)[:, None]
        factor = tl.load(
            up_at + at[None, :] * width_stride,
            mask=live[:, None] & (at < width)[None, :],
            other=0.0,
        )
        value = tl.load(
            inner_at + column[None, :], mask=present[:, None] & live[None, :], other=0.0
        )
        if WIDEN:
            factor = factor.to(tl.float32)
        else:
            value = value.to(factor.dtype)
        total = tl.dot(value, factor, total, input_precision="tf32x3")

    inside = (token < num_tokens)[:, None] & (at < width)[None, :]
    result = total.to(out.dtype.element_ty)
    if BASED:
        base_at = base + row * base_row_stride + token.to(tl.int64)[:, None] * base_token_stride
        base_values = tl.load(base_at + at[None, :], mask=inside, other=0.0)
        limit = tl.where(num_columns > 0, tl.load(lengths + row), 0)
        is_changed = token < limit
        changed = (base_values.to(tl.float32) + total).to(out.dtype.element_ty)
        result = tl.where(is_changed[:, None], changed, base_values.to(out.dtype.element_ty))
    out_at = out + (row * num_tokens + token)[:, None] * width + at[None, :]
    tl.store(out_at, result, mask=inside)


def low_rank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    routes: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    base: Tensor | None,
    norm: tuple[Tensor | None, Tensor, Tensor | None] | None,
    relu: bool,
) -> Tensor:
    """Compute `base + sum_s w_s act(norm(x) A_s^T) B_s`, rounded once.

    Args:
        x: [B L I], contiguous in I.
        down: [M R I], the factors `A`.
        up: [M R O], the factors `B`.
        routes: ids [B S], weights [B S], count [B] and lengths [B].
        base: [B L O], or None for zero.
        norm: Moments [B L 2], weight [I] and bias [I] or None of a layer norm; None for no norm.
        relu: Whether the activation is ReLU; identity otherwise.

    Returns:
        [B L O], in the dtype of `base`, or of `x` without one.
    """
    ids, weights, count, lengths = (part.contiguous() for part in routes)
    like = x if base is None else base
    num_rows, num_tokens = x.shape[:2]
    num_slots, rank, out_width = ids.shape[1], down.shape[1], up.shape[2]
    out = torch.empty((num_rows, num_tokens, out_width), dtype=like.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if num_slots == 0 or down.shape[0] == 0:
        return out.zero_() if base is None else out.copy_(base)
    down = down if down.stride(2) == 1 else down.contiguous()
    base = base if base is None or base.stride(2) == 1 else base.contiguous()

    step = max(1, INNER // (num_rows * num_tokens * rank))
    inner = torch.empty(
        num_rows * num_tokens * rank * min(step, num_slots), device=x.device, dtype=torch.float32
    )
    for first in range(0, num_slots, step):
        last = min(first + step, num_slots)
        # The sum stays in fp32 between slices of the slots and is rounded once, at the end.
        target = out if last == num_slots else torch.empty_like(out, dtype=torch.float32)
        _slice(x, down, up, (ids, weights, count, lengths), base, norm, relu, inner, target, first)
        base = target
    return out


def _slice(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    routes: tuple[Tensor, Tensor, Tensor, Tensor],
    base: Tensor | None,
    norm: tuple[Tensor | None, Tensor, Tensor | None] | None,
    relu: bool,
    inner: Tensor,
    out: Tensor,
    first: int,
) -> None:
    """Launch both products over as many slots from `first` as `inner` can hold."""
    ids, weights, count, lengths = routes
    num_rows, num_tokens, width = x.shape
    rank, out_width = down.shape[1], up.shape[2]
    last = min(first + inner.numel() // (num_rows * num_tokens * rank), ids.shape[1])
    moments, gamma, beta = (None, None, None) if norm is None else norm
    # Triton's interpreter multiplies the bit patterns of bf16.
    widen = knobs.runtime.interpret or x.dtype != down.dtype or down.dtype != up.dtype
    widen = widen or x.element_size() != 2
    block = blocks(num_tokens, (last - first) * rank, widen)
    token_tiles = triton.cdiv(num_tokens, block.tokens)
    shrink[(token_tiles, triton.cdiv((last - first) * rank, block.columns), num_rows)](
        x,
        moments,
        gamma,
        beta,
        down,
        ids,
        weights,
        count,
        lengths,
        inner,
        num_tokens,
        width,
        ids.shape[1],
        first,
        last,
        x.stride(0),
        x.stride(1),
        down.stride(0),
        down.stride(1),
        RANK=rank,
        NORMED=norm is not None,
        SHIFTED=beta is not None,
        RELU=relu,
        WIDEN=widen,
        TOKENS=block.tokens,
        COLUMNS=block.columns,
        WIDTH=block.depth,
        num_warps=block.num_warps,
        num_stages=3,
        enable_fp_fusion=True,
    )
    expand[(token_tiles, triton.cdiv(out_width, block.outputs), num_rows)](
        base,
        inner,
        up,
        ids,
        count,
        lengths,
        out,
        num_tokens,
        out_width,
        ids.shape[1],
        first,
        last,
        0 if base is None else base.stride(0),
        0 if base is None else base.stride(1),
        up.stride(0),
        up.stride(1),
        up.stride(2),
        RANK=rank,
        BASED=base is not None,
        WIDEN=widen,
        TOKENS=block.tokens,
        COLUMNS=block.step,
        WIDTH=block.outputs,
        num_warps=block.num_warps,
        num_stages=3,
        enable_fp_fusion=True,
    )


def grouped_lora(
    x: Tensor, down: Tensor, up: Tensor, edit_index: Tensor, base: Tensor | None
) -> Tensor:
    """Apply one low-rank edit per row as `ref.grouped_lora` does, without waiting for the device.

    Args:
        x: [B L I].
        down: [E R I], the factors `A`.
        up: [E O R], the factors `B`.
        edit_index: [B] int64, -1 for a row without an edit.
        base: [B L O], or None for zero.

    Returns:
        [B L O], in the dtype of `base`, or of `x` without one.
    """
    ids = edit_index[:, None]
    weights = torch.ones_like(ids, dtype=torch.float32)
    count = (edit_index >= 0).long()
    lengths = torch.full_like(count, x.shape[1])
    x = x if x.stride(2) == 1 else x.contiguous()
    routes = (ids, weights, count, lengths)
    return low_rank(x, down, up.mT, routes, base=base, norm=None, relu=False)
