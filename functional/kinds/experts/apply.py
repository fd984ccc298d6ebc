"""LiveEdit's experts at a decoder layer's output: routing features, the gate, the residual.

With h the output of the layer, V its image tokens, Q its prompt tokens after the image (never the
answer's), f = vision features of V conditioned on Q, g = query features of Q, and f' the vision
features of the sentinel image conditioned on Q:

    S   = { m : <f, E_m> > <f, f'> }                                  hard gate
    w_m = softmax_S(s)_m * sigmoid(s_m),    s_m = scale * <g, G_m>    soft weights
    h'  = h + sum_{m in S} w_m relu(LN(h) A_m^T) B_m                  at every token

Features are cross-attentions from S_q learned query tokens: these attend to Q, and the result
attends to V. A row is routed once, at its prompt; later tokens reuse `Batch.routing`.

Rows without an image use their prompt as V, and have a sentinel of their own. The last two columns
of the keys hold an expert's modality: (1, 0) image, (0, 1) text, (1, 1) neither. A row's features
hold -1e30 in the column of the other modality, which excludes the experts of that modality.

Attention has few queries here, so keys are never formed: q . (W_k x) = (W_k^T q) . x and
sum p (W_v x) = W_v (sum p x). This costs 2 L d S instead of 2 L d k multiplications. The bias of
W_k shifts all scores of a softmax equally and is left out.

Source: LiveEdit (arXiv 2411.15432), qizhou000/LiveEdit `editor/vllm_editors/liveedit/`. Different:
answer tokens never enter the gate (there they do, unless the caller passes the answer's length);
rows without an image can be edited (there, never); a pool may hold deleted experts.

Legend: B rows · L tokens · D width of the decoder · M experts · S query tokens · K width of a
feature · H heads · R rank · E edits of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.errors import ShapeError, UnknownSiteError
from errata.functional.header import Header
from errata.functional.kinds.common.patch import Decision, Patch, RoutedHook
from errata.functional.kinds.experts.entry import Experts
from errata.functional.types import Batch, Model
from errata.kernels import lora_moe
from errata.kernels.lora_moe import Routes

__all__ = [
    "EPS",
    "EXCLUDED",
    "FeatureExtractor",
    "RoutingFeatures",
    "TokenRoles",
    "apply_experts",
    "cross_attention",
    "load_extractor",
    "routing_features",
    "score_scale",
    "token_roles",
    "with_modality_columns",
]

EPS = 1e-5  # of every layer norm here
EXCLUDED = 1e30


class FeatureExtractor(NamedTuple):
    """What reads a row's features; constant queries are absorbed into `rows`."""

    prompt_norm: Tensor  # [2 D] weight and bias
    prompt_queries: Tensor  # [SH D]
    prompt_value: Tensor  # [K D]
    prompt_value_bias: Tensor  # [K]
    vision_query: Tensor  # [K K]
    vision_query_bias: Tensor  # [K]
    vision_key: Tensor  # [K D]
    vision_value: Tensor  # [K D]
    vision_value_bias: Tensor  # [K]
    query_norm: Tensor  # [2 D]
    query_queries: Tensor  # [SH D]
    query_value: Tensor  # [K D]
    query_value_bias: Tensor  # [K]


class TokenRoles(NamedTuple):
    """Which tokens of a row are what; a row without an image sees its prompt."""

    vision: Tensor  # [B L] bool
    prompt: Tensor  # [B L] bool
    answer: Tensor  # [B L] bool, after the prompt's last
    has_image: Tensor  # [B] bool


class RoutingFeatures(NamedTuple):
    """What a row is routed by."""

    vision: Tensor  # [B SK]
    query: Tensor  # [B SK]
    sentinel: Tensor  # [B SK] of the sentinel, as this row asks
    has_image: Tensor  # [B] bool


def score_scale(num_query_tokens: int, feature_dim: int) -> float:
    """Factor 1 / (S sqrt(K)) that turns products of features into a mean of scaled products.

    Args:
        num_query_tokens: S, query tokens of the extractor.
        feature_dim: K, width of one feature.

    Returns:
        The factor.
    """
    return 1 / (num_query_tokens * math.sqrt(feature_dim))


def token_roles(batch: Batch) -> TokenRoles:
    """Split each row's tokens into image, prompt and answer.

    The prompt counts from after the first image token, unless nothing follows the image.

    Args:
        batch: The rows that are run.

    Returns:
        Masks [B L], and which rows have an image.
    """
    in_prompt = (
        batch.prompt_end.int().flip(1).cumsum(1).flip(1) > 0
    )  # [B L], with the prompt's last
    image = batch.image_mask & in_prompt & batch.attention_mask
    words = in_prompt & batch.attention_mask & ~batch.image_mask
    after_image = words & (image.int().cumsum(1) > 0)
    has_image = image.any(1)
    prompt = torch.where(after_image.any(1, keepdim=True), after_image, words)
    return TokenRoles(
        vision=torch.where(has_image[:, None], image, prompt),
        prompt=prompt,
        answer=batch.attention_mask & ~in_prompt & batch.prompt_end.any(1, keepdim=True),
        has_image=has_image,
    )


def cross_attention(
    queries: Tensor, x: Tensor, mask: Tensor, value: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """Cross-attention whose queries already hold the key projection.

    p = softmax over kept tokens of x . query;  out_h = W_v,h (sum p x) + b_v,h;  0 without tokens.

    Args:
        queries: Folded queries, [SH D] or [B SH D].
        x: Hidden states, [B L D].
        mask: Tokens to attend to, [B L].
        value: W_v, [K D].
        bias: b_v, [K].
        num_heads: H.

    Returns:
        [B S K].
    """
    scores = x @ queries.mT  # [B L SH]
    scores = torch.where(mask[..., None], scores, -torch.inf)
    has_tokens = mask.any(1)[:, None, None]  # [B 1 1]
    weights = torch.where(has_tokens, scores, 0).softmax(1)  # [B L SH]
    pooled = (weights.mT @ x).unflatten(1, (-1, num_heads))  # [B S H D]
    out = torch.einsum("bshd,hkd->bshk", pooled, value.unflatten(0, (num_heads, -1)))
    return torch.where(has_tokens, out.flatten(2) + bias, 0)


def routing_features(
    extractor: FeatureExtractor,
    hidden_states: Tensor,
    roles: TokenRoles,
    num_heads: int,
    sentinels: tuple[Tensor, Tensor] | None = None,
) -> RoutingFeatures:
    """Compute the routing features of rows, and of the sentinels for these rows, in fp32.

    Differentiable in everything.

    Args:
        extractor: Weights of the feature extractor.
        hidden_states: Output of the edited layer, [B L D].
        roles: Which tokens are image, prompt and answer.
        num_heads: Attention heads.
        sentinels: Sentinel tokens [L' D] for rows with an image and [L'' D] for rows without. None:
            zeros.

    Returns:
        Features of the query, the image and the sentinel, [B SK] each.
    """
    hidden_states = hidden_states.float()
    normed = _layer_norm(hidden_states, extractor.prompt_norm)
    prompt_features = cross_attention(
        extractor.prompt_queries,
        normed,
        roles.prompt,
        extractor.prompt_value,
        extractor.prompt_value_bias,
        num_heads,
    )  # [B S K]
    queries = F.linear(
        prompt_features, extractor.vision_query, extractor.vision_query_bias
    ).unflatten(-1, (num_heads, -1))
    queries = queries / math.sqrt(queries.shape[-1])
    keys = extractor.vision_key.unflatten(0, (num_heads, -1))  # [H K/H D]
    absorbed_queries = torch.einsum("bshk,hkd->bshd", queries, keys).flatten(1, 2)  # [B SH D]
    attend_vision = partial(
        cross_attention,
        value=extractor.vision_value,
        bias=extractor.vision_value_bias,
        num_heads=num_heads,
    )
    vision = attend_vision(absorbed_queries, normed, roles.vision).flatten(1)
    query_states = _layer_norm(hidden_states, extractor.query_norm)
    query = cross_attention(
        extractor.query_queries,
        query_states,
        roles.prompt,
        extractor.query_value,
        extractor.query_value_bias,
        num_heads,
    ).flatten(1)
    if sentinels is None:
        return RoutingFeatures(vision, query, torch.zeros_like(vision), roles.has_image)
    sentinel_states = _layer_norm(torch.cat(sentinels).float(), extractor.prompt_norm)  # [L'+L'' D]
    sentinel_mask = torch.arange(
        len(sentinel_states), device=sentinel_states.device, dtype=torch.int64
    ) < len(sentinels[0])
    sentinel_mask = sentinel_mask == roles.has_image[:, None]  # [B L'+L'']
    sentinel = attend_vision(
        absorbed_queries, sentinel_states.expand(len(hidden_states), -1, -1), sentinel_mask
    ).flatten(1)
    return RoutingFeatures(vision, query, sentinel, roles.has_image)


def _layer_norm(x: Tensor, norm: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm[0], norm[1], EPS)


def with_modality_columns(vision: Tensor, has_image: Tensor) -> Tensor:
    """Append two columns that exclude experts of the other modality.

    Args:
        vision: Vision features, [B SK].
        has_image: Which rows have an image, [B].

    Returns:
        [B SK+2].
    """
    excluded = torch.full_like(vision[:, 0], -EXCLUDED)
    columns = torch.stack(
        [torch.where(has_image, 0, excluded), torch.where(has_image, excluded, 0)], 1
    )
    return torch.cat([vision, columns], 1)


def load_extractor(entry: Experts, tensors: Mapping[str, Tensor]) -> FeatureExtractor:
    """Read the feature extractor out of an entry's tensors, in fp32.

    Args:
        entry: Entry of the delta.
        tensors: Tensors of the delta.

    Returns:
        The extractor's weights.
    """
    names = (field.replace("_", ".", 1) for field in FeatureExtractor._fields)
    return FeatureExtractor(*(tensors[f"{entry.name}.{name}"].float() for name in names))


def apply_experts(
    model: Model, header: Header, entry: Experts, tensors: Mapping[str, Tensor]
) -> Patch:
    """Build the patch of a pool of experts: it changes the output of one decoder layer.

    Args:
        model: Model to bind to.
        header: Header of the delta.
        entry: Entry of the delta.
        tensors: Tensors of the delta.

    Returns:
        A patch with one routed hook.

    Raises:
        UnknownSiteError: If the site is not a decoder layer.
        ShapeError: If the experts are for a model of another width.
    """
    layer = model.card.layer_of(model.card.canonical_name(entry.name))
    if layer is None:
        raise UnknownSiteError(
            f"experts must be at a decoder layer of {model.card.id}, and {entry.name!r} is in none."
        )
    if entry.hidden_size != model.card.hidden_size:
        raise ShapeError(
            f"{entry.name}: the experts must read rows as wide as the model's, "
            f"{model.card.hidden_size}; theirs are {entry.hidden_size}."
        )
    expert_tensors = {
        part: tensors[f"{entry.name}.{part}"] for part in ("down", "up", "input_norm")
    }
    stacked = bool(header.stack)
    if stacked:
        expert_tensors |= {part: expert_tensors[part].flatten(0, 1) for part in ("down", "up")}
    route = _make_router(entry, tensors, stacked)

    def decide(batch: Batch, x: Tensor, y: Tensor) -> Decision:
        hidden_states = y.reshape(*batch.attention_mask.shape, -1)
        with torch.no_grad():
            return route(batch, hidden_states.detach())._asdict()

    def apply(batch: Batch, x: Tensor, y: Tensor, decision: Decision) -> Tensor:
        hidden_states = y.reshape(*batch.attention_mask.shape, -1)
        norm = (
            expert_tensors["input_norm"][0].to(hidden_states.device),
            expert_tensors["input_norm"][1].to(hidden_states.device),
        )
        return lora_moe.apply_experts(
            hidden_states,
            expert_tensors["down"],
            expert_tensors["up"],
            Routes(**decision),
            norm=norm,
            eps=EPS,
            lengths=batch.attention_mask.sum(1),
        ).view(y.shape)

    return Patch(routed_hooks={f"{model.card.layers}.{layer}": RoutedHook(decide, apply)})


def _make_router(
    entry: Experts, tensors: Mapping[str, Tensor], stacked: bool
) -> Callable[[Batch, Tensor], Routes]:
    """(batch, the layer's output) -> the experts of each row."""
    extractor = load_extractor(entry, tensors)
    vision_keys, query_keys, *sentinels = (
        tensors[f"{entry.name}.{part}"].float()
        for part in ("vision_keys", "query_keys", "sentinel", "sentinel_text")
    )
    scale = score_scale(entry.num_query_tokens, entry.feature_dim)
    num_experts = entry.num_experts
    top_k = min(entry.top_k or num_experts, num_experts)

    def route(batch: Batch, hidden_states: Tensor) -> Routes:
        features = routing_features(
            extractor,
            hidden_states,
            token_roles(batch),
            entry.num_heads,
            (sentinels[0], sentinels[1]),
        )
        threshold = scale * (features.vision * features.sentinel).sum(-1)
        is_routed = batch.prompt_end.any(1) & (batch.edit_index >= 0 if stacked else True)
        threshold = torch.where(is_routed, threshold, torch.inf)
        vision = with_modality_columns(features.vision, features.has_image)
        query = features.query
        if entry.routing_input == "query_and_vision":
            query = torch.cat([query, features.vision], 1)
        if not stacked:
            return lora_moe.route_experts(
                vision, query, threshold, vision_keys, query_keys, scale=scale, top_k=top_k
            )
        edit_rows = batch.edit_index.clamp_min(0)
        route_one = partial(lora_moe.route_experts, scale=scale, top_k=top_k)
        routes = torch.vmap(route_one)(
            vision[:, None],
            query[:, None],
            threshold[:, None],
            vision_keys[edit_rows],
            query_keys[edit_rows],
        )
        ids, weights, counts = (part[:, 0] for part in routes)
        # the experts of all edits are concatenated
        return Routes(
            torch.where(ids < 0, ids, ids + edit_rows[:, None] * num_experts), weights, counts
        )

    return route
