"""LiveEdit's experts: choose a few low-rank experts per sequence and apply them.

Legend: B sequences · L tokens · D hidden width · M experts in the pool · S slots (experts chosen
for a sequence) · R rank · P, Q widths of the vision and the query keys
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from errata.kernels import custom_op
from errata.kernels.lora_moe import ref
from errata.kernels.lora_moe.ref import expert_weights

__all__ = ["Routes", "apply_experts", "expert_weights", "route_experts"]

ACTIVATIONS = ("relu", "identity")


class Routes(NamedTuple):
    """The experts of each sequence, in ascending order.

    Attributes:
        ids: [B S] int64, -1 in an empty slot; empty slots come last.
        weights: [B S] fp32, 0 in an empty slot.
        count: [B] int64, the experts of each sequence.
    """

    ids: Tensor
    weights: Tensor
    count: Tensor


def _fake_route(
    vision: Tensor,
    query: Tensor,
    threshold: Tensor,
    vision_keys: Tensor,
    query_keys: Tensor,
    is_active: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (vision.shape[0], vision_keys.shape[0])
    return (
        vision.new_empty(shape, dtype=torch.int64),
        vision.new_empty(shape, dtype=torch.float32),
        vision.new_empty(shape[:1], dtype=torch.int64),
    )


def _fake_apply(hidden_states: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


_route_experts_op = custom_op.register(
    "route_experts",
    ref.route_experts,
    _fake_route,
    twin="errata.kernels.lora_moe.triton",
    row_arguments=(0, 1, 2),
)
_apply_experts_op = custom_op.register(
    "apply_experts",
    ref.apply_experts,
    _fake_apply,
    twin="errata.kernels.lora_moe.triton",
    row_arguments=(0, 3, 4, 5, 6),
)


def route_experts(
    vision: Tensor,
    query: Tensor,
    threshold: Tensor,
    vision_keys: Tensor,
    query_keys: Tensor,
    *,
    scale: float = 1.0,
    is_active: Tensor | None = None,
    top_k: int | None = None,
) -> Routes:
    """Choose and weight the experts of each sequence, without waiting for the device.

    `S = {m : scale <v, E_m> > threshold}`, `s_m = scale <g, G_m>`,
    `w_m = softmax_S(s)_m * sigmoid(s_m)`

    The gate is strict: an expert as similar as the threshold is not chosen. An expert whose
    similarity or score is not finite is not chosen either. No gradient flows through the op; to
    train a router, use `expert_weights` on plain scores.

    Args:
        vision: [B P], the features `v` of each sequence.
        query: [B Q], the features `g`.
        threshold: [B], in the units of `scale * <v, E_m>` (LiveEdit: the similarity of `v` to its
            prototype).
        vision_keys: [M P], `E`; M may be 0.
        query_keys: [M Q], `G`.
        scale: Factor of both products. LiveEdit: `1 / (4 * sqrt(1024))` for 4 slots of width 1024.
        is_active: [M] bool, False for deleted experts. All are active by default.
        top_k: Keep the `top_k` largest weights (lowest ids on ties), unchanged; the routes then
            have `min(top_k, M)` slots instead of M.

    Returns:
        The experts of each sequence.

    Raises:
        ValueError: If shapes or devices do not fit, or `top_k` is below 1.

    References:
        LiveEdit, arXiv 2411.15432; qizhou000/LiveEdit `editor/vllm_editors/liveedit/liveedit.py`.

    Example:
        >>> pool = torch.eye(3)
        >>> routes = route_experts(pool[:1], pool[:1], torch.tensor([0.5]), pool, pool)
        >>> routes.ids, routes.weights, routes.count
        (tensor([[ 0, -1, -1]]), tensor([[0.7311, 0.0000, 0.0000]]), tensor([1]))
    """
    num_rows, num_experts = vision.shape[0], vision_keys.shape[0]
    expected_shapes = {
        "vision": (vision, [num_rows, vision.shape[-1]]),
        "query": (query, [num_rows, query.shape[-1]]),
        "threshold": (threshold, [num_rows]),
        "vision_keys": (vision_keys, [num_experts, vision.shape[-1]]),
        "query_keys": (query_keys, [num_experts, query.shape[-1]]),
        "is_active": (is_active, [num_experts]),
    }
    problems = _shape_mismatches(expected_shapes)
    if top_k is not None and top_k < 1:
        problems.append(f"top_k must be at least 1, got {top_k}")
    problems += custom_op.device_mismatches("route_experts", vision=vision, vision_keys=vision_keys)
    custom_op.raise_if_invalid("route_experts", problems)

    if is_active is None:
        is_active = torch.ones_like(vision_keys[:, 0], dtype=torch.bool)
    tensors = [vision, query, threshold, vision_keys, query_keys, is_active]
    routes = Routes(*_route_experts_op(*[tensor.detach() for tensor in tensors], scale))
    return routes if top_k is None else _keep_top_k(routes, min(top_k, num_experts))


def _keep_top_k(routes: Routes, num_slots: int) -> Routes:
    # Stable, so that equal weights keep the lower id. An empty slot sorts after every expert.
    slots = torch.arange(routes.ids.shape[1], device=routes.ids.device, dtype=torch.int64)
    is_filled = slots < routes.count[:, None]
    order = torch.where(is_filled, routes.weights, -1).sort(dim=1, descending=True, stable=True)[1]
    chosen = order[:, :num_slots].sort(dim=1)[0]  # [B S]
    return Routes(
        routes.ids.gather(1, chosen),
        routes.weights.gather(1, chosen),
        routes.count.clamp(max=num_slots),
    )


def apply_experts(
    hidden_states: Tensor,
    down: Tensor,
    up: Tensor,
    routes: Routes,
    *,
    norm: tuple[Tensor, Tensor | None] | None = None,
    eps: float = 1e-5,
    activation: Literal["relu", "identity"] = "relu",
    lengths: Tensor | None = None,
) -> Tensor:
    """Add to each sequence the output of its own experts.

    `h + sum_s w_s * act(x A_s^T) B_s`, with `x = layer_norm(h)` if `norm` is given, else `h`

    Computed in fp32 and rounded once to the dtype of `hidden_states`; `[L, M, D]` is never formed.
    A sequence without experts keeps its bits. Under `torch.no_grad` the compiled op runs, at a cost
    proportional to `routes.count`. If a gradient may be needed, the same formula runs in plain
    torch over all slots of `routes`; limit them with `route_experts(..., top_k=...)`. It supports
    every transform of `torch.func`.

    Args:
        hidden_states: [B L D].
        down: [M R D], the experts' first factors `A`.
        up: [M R D], the experts' second factors `B`.
        routes: The experts of the B sequences.
        norm: Weight [D] and bias [D] (or None) of the layer norm; None for no norm.
        eps: Epsilon of the layer norm.
        activation: "relu" (LiveEdit) or "identity" (LoRA experts).
        lengths: [B], tokens of each sequence; those after them keep their bits. All by default.

    Returns:
        [B L D], in the dtype of `hidden_states`.

    Raises:
        ValueError: If shapes, devices or the activation do not fit.

    References:
        LiveEdit, arXiv 2411.15432; qizhou000/LiveEdit `editor/vllm_editors/liveedit/liveedit.py`.

    Example:
        >>> routes = Routes(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([1]))
        >>> apply_experts(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 2), routes)
        tensor([[[2., 2.]]])
    """
    gamma, beta = (None, None) if norm is None else norm
    lead, width = hidden_states.shape[:1], hidden_states.shape[-1]
    experts = [down.shape[0], down.shape[1] if down.ndim > 1 else 0, width]
    expected_shapes = {
        "hidden_states": (hidden_states, [*hidden_states.shape[:2], width]),
        "down": (down, experts),
        "up": (up, experts),
        "routes.ids": (routes.ids, [*lead, routes.ids.shape[-1]]),
        "routes.weights": (routes.weights, [*lead, routes.ids.shape[-1]]),
        "routes.count": (routes.count, [*lead]),
        "norm weight": (gamma, [width]),
        "norm bias": (beta, [width]),
        "lengths": (lengths, [*lead]),
    }
    problems = _shape_mismatches(expected_shapes)
    if hidden_states.ndim != 3:
        problems.append(f"hidden_states must be [B L D], got {list(hidden_states.shape)}")
    if activation not in ACTIVATIONS:
        problems.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    problems += custom_op.device_mismatches(
        "apply_experts", hidden_states=hidden_states, down=down, up=up, ids=routes.ids
    )
    custom_op.raise_if_invalid("apply_experts", problems)

    if lengths is None:
        lengths = torch.full_like(routes.count, hidden_states.shape[1])
    tensors = (hidden_states, down, up, *routes, lengths, gamma, beta)
    if custom_op.needs_autograd(hidden_states, down, up, routes.weights, gamma, beta):
        return ref.apply_experts_differentiable(*tensors, eps, activation)  # pyright: ignore[reportCallIssue]
    detached = (tensor if tensor is None else tensor.detach() for tensor in tensors)
    return _apply_experts_op(*detached, eps, activation)


def _shape_mismatches(expected_shapes: dict[str, tuple[Tensor | None, list[int]]]) -> list[str]:
    return [
        f"{name} must be {shape}, got {list(tensor.shape)}"
        for name, (tensor, shape) in expected_shapes.items()
        if tensor is not None and list(tensor.shape) != shape
    ]
