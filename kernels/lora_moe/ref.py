"""Expert routing and low-rank expert application in plain torch.

Legend: B sequences · L tokens · D hidden width · M experts in the pool · S slots (experts chosen
for a sequence) · R rank · P, Q widths of the vision and the query keys
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.kernels import custom_op

WIDENED = 1 << 22  # elements of gathered or widened keys and experts in memory at once
HIDDEN = 1 << 24  # expert activations [B, L, S R] in memory at once
TOKENS = 64, 256  # fewest and most tokens per step on a CPU; between them, one per column


def expert_weights(scores: Tensor, gate: Tensor) -> Tensor:
    """Weight the gated experts: softmax over them, times the sigmoid of their scores.

    Differentiable plain torch. A row without a gated expert is safe, and so is any score of an
    expert that is not gated.

    Args:
        scores: [B M].
        gate: [B M] bool, True for the gated experts.

    Returns:
        [B M], 0 for an expert that is not gated.
    """
    scores = torch.where(gate, scores, 0)
    top = torch.where(gate, scores, -math.inf).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    exponentials = torch.where(gate, (scores - top).exp(), 0)
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / torch.where(total == 0, 1, total) * scores.sigmoid()


def route_experts(
    vision: Tensor,
    query: Tensor,
    threshold: Tensor,
    vision_keys: Tensor,
    query_keys: Tensor,
    is_active: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate experts by vision, weight them by query, and move the chosen ones to the first slots.

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
    ids = torch.full((num_rows, num_experts), -1, dtype=torch.int64, device=vision.device)
    weights = torch.zeros((num_rows, num_experts), dtype=torch.float32, device=vision.device)
    if ids.numel() == 0:
        return ids, weights, torch.zeros_like(threshold, dtype=torch.int64)

    similarity = _products(vision, vision_keys) * scale
    gate = is_active & (similarity > threshold.float()[:, None])  # [B M]
    gated_experts = gate.any(0).nonzero()[:, 0]
    scores = torch.zeros_like(weights)
    for part in gated_experts.split(max(1, WIDENED // query_keys.shape[1])):
        scores[:, part] = _products(query, query_keys[part]) * scale
    gate &= scores.isfinite()
    row_weights = expert_weights(scores, gate)

    row, expert = gate.nonzero(as_tuple=True)
    slot = gate.cumsum(1)[row, expert] - 1
    ids[row, slot] = expert
    weights[row, slot] = row_weights[row, expert]
    return ids, weights, gate.sum(1)


def _products(features: Tensor, keys: Tensor) -> Tensor:
    """Compute `features @ keys.T` in fp32: [B P], [M P] -> [B M]."""
    features = features.float()
    if keys.dtype == torch.float32:
        return custom_op.affine(features, keys)
    step = max(1, WIDENED // keys.shape[1])
    return torch.cat([custom_op.affine(features, part.float()) for part in keys.split(step)], 1)


def apply_experts_differentiable(
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
    """Compute `h + sum_s w_s act(x A_s^T) B_s` with `x = layer_norm(h)` in fp32, rounded once.

    Runs if a gradient may be needed: every shape is static and every step differentiable.

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
    num_slots, rank = ids.shape[1], down.shape[1]
    if num_slots == 0 or down.shape[0] == 0:
        return hidden_states
    is_filled = (
        torch.arange(num_slots, device=ids.device, dtype=torch.int64) < count[:, None]
    )  # [B S]
    # An empty slot repeats the first expert of the sequence with weight zero. An expert with NaN
    # (0 * NaN) then affects only the sequences that chose it.
    slots = torch.where(is_filled, ids, ids[:, :1].clamp(min=0))
    weights = torch.where(is_filled, weights, 0)

    normed = _layer_norm(hidden_states, gamma, beta, eps)  # [B L D]
    total = hidden_states.float()
    step = max(1, HIDDEN // max(1, hidden_states.shape[0] * hidden_states.shape[1] * rank))
    for part, weight in zip(slots.split(step, 1), weights.split(step, 1)):
        columns = weight.repeat_interleave(rank, 1)[:, None]  # [B 1 SR]
        inner = torch.bmm(normed, down[part].float().flatten(1, 2).mT)  # [B L SR]
        inner = (F.relu(inner) if activation == "relu" else inner) * columns
        total = torch.baddbmm(total, inner, up[part].float().flatten(1, 2))  # [B L D]

    tokens = (
        torch.arange(hidden_states.shape[1], device=hidden_states.device, dtype=torch.int64)
        < lengths[:, None]
    )  # [B L]
    is_changed = (tokens & (count > 0)[:, None])[..., None]
    return torch.where(is_changed, total.to(hidden_states.dtype), hidden_states)


def _layer_norm(
    hidden_states: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    if gamma is None:
        return hidden_states.float()
    shift = None if beta is None else beta.float()
    return F.layer_norm(hidden_states.float(), hidden_states.shape[-1:], gamma.float(), shift, eps)


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
    """Compute `h + sum_s w_s act(x A_s^T) B_s` with `x = layer_norm(h)`; without gradients.

    Each sequence costs its own tokens and experts, not all M.

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
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    for row, (slots, length) in enumerate(zip(count.tolist(), lengths.tolist())):
        length = min(length, hidden_states.shape[1]) if slots else 0
        out[row, length:] = hidden_states[row, length:]
        if length == 0:
            continue
        # Experts are gathered once if they fit, otherwise again for each block of tokens.
        step = max(1, WIDENED // (down.shape[1] * down.shape[2]))
        parts = list(zip(ids[row, :slots].split(step), weights[row, :slots].split(step)))
        gathered = [_gather_factors(down, up, *parts[0])] if len(parts) == 1 else None
        tokens = min(max(TOKENS[0], slots * down.shape[1]), TOKENS[1])
        for start in range(0, length, tokens):
            block = slice(start, min(start + tokens, length))
            experts = gathered or (_gather_factors(down, up, *part) for part in parts)
            normed = _layer_norm(hidden_states[row, block], gamma, beta, eps)
            _add_experts(hidden_states[row, block], normed, experts, activation, out[row, block])
            del normed  # before the next one is made
    return out


def _add_experts(
    hidden_states: Tensor,
    normed: Tensor,
    experts: Iterable[tuple[Tensor, Tensor, Tensor]],
    activation: str,
    out: Tensor,
) -> None:
    """Write a block of tokens [T D] plus the output of the gathered experts to `out`, in fp32."""
    start = hidden_states.float()
    total = out if out.dtype == torch.float32 else torch.empty_like(start)
    for first, second, columns in experts:
        inner = custom_op.affine(normed, first)  # [T SR]
        inner = (F.relu(inner) if activation == "relu" else inner) * columns
        start = torch.addmm(start, inner, second, out=total)
    if total is not out:
        out.copy_(total)


def _gather_factors(
    down: Tensor, up: Tensor, experts: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather factors of some experts as fp32 columns [SR D], [SR D] and their weights [SR]."""
    first, second = down[experts].float(), up[experts].float()
    return first.flatten(0, 1), second.flatten(0, 1), weights.repeat_interleave(down.shape[1])
