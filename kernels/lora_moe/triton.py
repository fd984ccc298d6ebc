"""Routing and expert application on a GPU; the two products are those of `grouped_lora`.

Legend: B sequences · L tokens · D hidden width · M experts · S slots · R rank
"""

# Triton reads a kernel as its own language and takes launch options that pyright cannot see.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from errata.kernels.grouped_lora.triton import low_rank
from errata.kernels.lora_moe import ref

EXPERTS, ROWS, WIDTH = 64, 16, 32  # block of the routing scores
SPAN = 1024  # experts per step of the softmax and the compaction


@triton.jit
def score_experts(
    vision,
    query,
    threshold,
    vision_keys,
    query_keys,
    is_active,
    scores,
    num_rows,
    num_experts,
    vision_width,
    query_width,
    scale,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute `scale <g_b, G_m>` of each expert whose gate is open.

    A gate is open if `scale <v_b, E_m> > threshold_b`.

    The query keys are read only for a tile of experts in which some gate is open. The experts take
    the first axis of the products.

    Args:
        vision: Pointer to [B P].
        query: Pointer to [B Q].
        threshold: Pointer to [B].
        vision_keys: Pointer to [M P].
        query_keys: Pointer to [M Q].
        is_active: Pointer to [M] uint8.
        scores: Pointer to the output [B M] fp32; -inf if the gate is closed.
        num_rows: B.
        num_experts: M.
        vision_width: P.
        query_width: Q.
        scale: Factor of both products.
        EXPERTS: Experts per program.
        ROWS: Sequences per program.
        WIDTH: Columns per step.
    """  # noqa: DOC107
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_scored = tl.load(is_active + expert, mask=expert < num_experts, other=0) != 0
    expert_row = expert.to(tl.int64)[:, None]
    batch_row = row.to(tl.int64)[:, None]
    inside = (row < num_rows)[:, None]

    similarity = tl.zeros([EXPERTS, ROWS], tl.float32)
    for start in range(0, vision_width, WIDTH):
        at = start + column[None, :]
        valid = at < vision_width
        key = tl.load(
            vision_keys + expert_row * vision_width + at, mask=is_scored[:, None] & valid, other=0
        )
        features = tl.load(vision + batch_row * vision_width + at, mask=inside & valid, other=0)
        similarity = tl.dot(
            key.to(tl.float32),
            tl.trans(features.to(tl.float32)),
            similarity,
            input_precision="tf32x3",
        )
    gate_threshold = tl.load(threshold + row, mask=row < num_rows, other=float("inf")).to(
        tl.float32
    )
    gate = is_scored[:, None] & (similarity * scale > gate_threshold[None, :])  # NaN opens no gate

    score = tl.full([EXPERTS, ROWS], float("-inf"), tl.float32)
    if tl.max(tl.max(gate.to(tl.int32), 1), 0) > 0:
        product = tl.zeros([EXPERTS, ROWS], tl.float32)
        for start in range(0, query_width, WIDTH):
            at = start + column[None, :]
            valid = at < query_width
            key = tl.load(
                query_keys + expert_row * query_width + at, mask=is_scored[:, None] & valid, other=0
            )
            features = tl.load(query + batch_row * query_width + at, mask=inside & valid, other=0)
            product = tl.dot(
                key.to(tl.float32),
                tl.trans(features.to(tl.float32)),
                product,
                input_precision="tf32x3",
            )
        product = product * scale
        finite = (product > float("-inf")) & (product < float("inf"))
        score = tl.where(gate & finite, product, float("-inf"))
    score_at = scores + row.to(tl.int64)[None, :] * num_experts + expert[:, None]
    tl.store(score_at, score, mask=(expert < num_experts)[:, None] & (row < num_rows)[None, :])


@triton.jit
def compact_routes(scores, ids, weights, count, num_experts, SPAN: tl.constexpr):
    """Compute `softmax * sigmoid` over the gated experts of a row, in its first slots.

    Args:
        scores: Pointer to [B M] fp32, -inf if the gate is closed.
        ids: Pointer to the output [B M] int64, -1 in an empty slot.
        weights: Pointer to the output [B M] fp32, 0 in an empty slot.
        count: Pointer to the output [B] int64.
        num_experts: M.
        SPAN: Experts per step.
    """  # noqa: DOC107
    row = tl.cast(tl.program_id(0), tl.int64) * num_experts
    offset = tl.arange(0, SPAN)
    highest = tl.full([SPAN], float("-inf"), tl.float32)
    for start in range(0, num_experts, SPAN):
        at = start + offset
        score = tl.load(scores + row + at, mask=at < num_experts, other=float("-inf"))
        highest = tl.maximum(highest, score)
    top = tl.max(highest, 0)
    top = tl.where(top > float("-inf"), top, 0.0)
    totals = tl.zeros([SPAN], tl.float32)
    for start in range(0, num_experts, SPAN):
        at = start + offset
        score = tl.load(scores + row + at, mask=at < num_experts, other=float("-inf"))
        totals += tl.exp(score - top)
    total = tl.sum(totals, 0)
    total = tl.where(total == 0, 1.0, total)

    filled = tl.full([], 0, tl.int32)
    for start in range(0, num_experts, SPAN):
        at = start + offset
        score = tl.load(scores + row + at, mask=at < num_experts, other=float("-inf"))
        gate = score > float("-inf")
        small = tl.exp(-tl.abs(score))  # sigmoid without overflow
        sigmoid = tl.where(score >= 0, 1.0, small) / (1 + small)
        slot = filled + tl.cumsum(gate.to(tl.int32), 0) - 1
        tl.store(ids + row + slot, at.to(tl.int64), mask=gate)
        tl.store(weights + row + slot, tl.exp(score - top) / total * sigmoid, mask=gate)
        filled += tl.sum(gate.to(tl.int32), 0)
    for start in range(0, num_experts, SPAN):
        slot = start + offset
        empty = (slot >= filled) & (slot < num_experts)
        tl.store(ids + row + slot, tl.full([SPAN], -1, tl.int64), mask=empty)
        tl.store(weights + row + slot, tl.zeros([SPAN], tl.float32), mask=empty)
    tl.store(count + tl.program_id(0), filled.to(tl.int64))


def route_experts(
    vision: Tensor,
    query: Tensor,
    threshold: Tensor,
    vision_keys: Tensor,
    query_keys: Tensor,
    is_active: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose and weight experts as `ref.route_experts` does: two launches, no wait for the device.

    Args:
        vision: [B P].
        query: [B Q].
        threshold: [B].
        vision_keys: [M P].
        query_keys: [M Q].
        is_active: [M] bool.
        scale: Factor of both products.

    Returns:
        Ids [B M] int64, -1 in an empty slot, weights [B M] fp32, 0 there, and count [B] int64.
    """
    num_rows, num_experts = vision.shape[0], vision_keys.shape[0]
    if num_rows == 0 or num_experts == 0:
        return ref.route_experts(
            vision, query, threshold, vision_keys, query_keys, is_active, scale
        )
    scores = torch.empty((num_rows, num_experts), device=vision.device, dtype=torch.float32)
    ids = torch.empty_like(scores, dtype=torch.int64)
    count = torch.empty_like(ids[:, 0])
    weights = torch.empty_like(scores)
    score_experts[(triton.cdiv(num_experts, EXPERTS), triton.cdiv(num_rows, ROWS))](
        vision.contiguous(),
        query.contiguous(),
        threshold.contiguous(),
        vision_keys.contiguous(),
        query_keys.contiguous(),
        is_active.contiguous().view(torch.uint8),
        scores,
        num_rows,
        num_experts,
        vision.shape[1],
        query.shape[1],
        scale,
        EXPERTS=EXPERTS,
        ROWS=ROWS,
        WIDTH=WIDTH,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    compact_routes[(num_rows,)](
        scores, ids, weights, count, num_experts, SPAN=SPAN, num_warps=4, enable_fp_fusion=True
    )
    return ids, weights, count


@triton.jit
def row_moments(hidden_states, moments, width, row_stride, eps, WIDTH: tl.constexpr):
    """Compute mean and reciprocal deviation of each row, in two passes over registers.

    Args:
        hidden_states: Pointer to [rows D].
        moments: Pointer to the output [rows 2] fp32.
        width: D.
        row_stride: Elements between two rows.
        eps: Epsilon of the layer norm.
        WIDTH: D, rounded up to a power of 2.
    """  # noqa: DOC107
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(hidden_states + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / width
    centered = tl.where(inside, x - mean, 0.0)
    tl.store(moments + 2 * row, mean)
    tl.store(moments + 2 * row + 1, tl.rsqrt(tl.sum(centered * centered, 0) / width + eps))


def apply_experts(
    hidden_states: Tensor,
    down: Tensor,
    up: Tensor,
    ids: Tensor,
    weights: Tensor,
    count: Tensor,
    lengths: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """Apply experts as `ref.apply_experts` does: no wait for the device.

    Takes one launch for the layer norm, if there is one, and two per slice of the slots that fits
    in memory.

    Args:
        hidden_states: [B L D].
        down: [M R D], the factors `A`.
        up: [M R D], the factors `B`.
        ids: [B S] int64.
        weights: [B S] fp32.
        count: [B] int64, the filled slots of each sequence.
        lengths: [B] int64, the tokens of each sequence.
        gamma: [D], the weight of the layer norm, or None for no norm.
        beta: [D], its bias, or None.
        eps: Epsilon of the layer norm.
        activation: "relu" or "identity".

    Returns:
        [B L D], in the dtype of `hidden_states`.
    """
    hidden_states = hidden_states if hidden_states.stride(2) == 1 else hidden_states.contiguous()
    moments = None
    if gamma is not None and hidden_states.numel():
        flat = hidden_states.contiguous()
        moments = torch.empty(
            (*hidden_states.shape[:2], 2), device=hidden_states.device, dtype=torch.float32
        )
        row_moments[(hidden_states.shape[0] * hidden_states.shape[1],)](
            flat,
            moments,
            hidden_states.shape[2],
            flat.stride(1),
            eps,
            WIDTH=triton.next_power_of_2(hidden_states.shape[2]),
            num_warps=8,
            enable_fp_fusion=True,
        )
    return low_rank(
        hidden_states,
        down,
        up,
        (ids, weights, count, lengths),
        base=hidden_states,
        norm=None if gamma is None else (moments, gamma, beta),
        relu=activation == "relu",
    )
