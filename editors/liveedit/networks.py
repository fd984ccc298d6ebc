"""LiveEdit's networks: what reads routing features, and what makes an edit's expert.

Each is a cross-attention from a few learned slots to tokens of the residual stream:

    reader    u = Attn(slots, LN(Q)),  f = Attn(u, LN(V));   g = Attn(slots', LN'(Q))
    maker     C = Attn(slots, LN([V; Q; A])) * strength / sqrt(R)        one row per slot

with one reader for edits (their keys), one for questions, and makers of the down and up factors.
The keys' bias of an attention moves all scores of its softmax alike and is left out. The arithmetic
is `functional/kinds/experts/apply.py`'s, where constant queries are absorbed into the keys.

Source: qizhou000/LiveEdit `editor/vllm_editors/liveedit/modules.py`, QVExtractor and
LowRankGenerator. Legend: D width of the decoder · S slots · K width of a slot · H heads · R rank ·
B rows · L tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import Batch
from errata.functional.kinds.experts.apply import (
    EPS,
    FeatureExtractor,
    cross_attention,
    routing_features,
    token_roles,
)

if TYPE_CHECKING:
    from errata.editors.liveedit.config import LiveEditConfig

__all__ = [
    "CrossAttention",
    "ExpertPool",
    "FactorGenerator",
    "FeatureNetwork",
    "LiveEditNetworks",
    "fold_queries",
    "generate_factor",
    "init_networks",
    "make_pool",
]


class CrossAttention(NamedTuple):
    """A cross-attention: maps of queries (with shift), keys, and values (with bias)."""

    query: Tensor  # [K K]
    query_bias: Tensor  # [K]
    key: Tensor  # [K D]
    value: Tensor  # [K D], of a maker [D D]
    value_bias: Tensor  # [K], of a maker [D]


class ExpertPool(NamedTuple):
    """Experts and their keys."""

    vision_keys: Tensor  # [N SK+2]
    query_keys: Tensor  # [N SK], with blend "query_and_vision" [N 2SK]
    down: Tensor  # [N R D]
    up: Tensor  # [N R D]


class FeatureNetwork(NamedTuple):
    """What reads the features of a row."""

    norm: Tensor  # [2 D] before `asked` and `seen`: weight and bias
    query_tokens: Tensor  # [S K]
    prompt: CrossAttention
    vision: CrossAttention
    query_norm: Tensor  # [2 D]
    question_tokens: Tensor  # [S K]
    query: CrossAttention


class FactorGenerator(NamedTuple):
    """What makes one factor of an expert."""

    norm: Tensor  # [2 D]
    query_tokens: Tensor  # [R K]
    attention: CrossAttention
    answer_positions: (
        Tensor  # [P D] added to the prompt's last token and those of the answer, in order
    )


class LiveEditNetworks(NamedTuple):
    """All that is trained."""

    edit_features: FeatureNetwork  # an edit's keys
    query_features: FeatureNetwork  # a question's features
    down: FactorGenerator
    up: FactorGenerator
    input_norm: Tensor  # [2 D] of what experts are given
    sentinel: Tensor  # [L' D] the image that stands for "no edit"
    sentinel_text: Tensor  # [L'' D] the same for rows without an image


def init_networks(
    hidden_size: int,
    num_query_tokens: int,
    feature_dim: int,
    rank: int,
    num_sentinel_tokens: int,
    num_text_sentinel_tokens: int,
    generator: torch.Generator,
    num_answer_positions: int = 0,
) -> LiveEditNetworks:
    """Initialise the networks as the original does.

    Linear maps are uniform in 1/sqrt(in), tokens normal. The two feature networks start equal and
    without a vision bias, so that a question is nearer to its own edit than to the sentinel from
    the start; the original draws them independently.

    Args:
        hidden_size: D, width of the model.
        num_query_tokens: S, query tokens of a feature.
        feature_dim: K, width of a feature.
        rank: R, rank of an expert.
        num_sentinel_tokens: Sentinel tokens for rows with an image.
        num_text_sentinel_tokens: Sentinel tokens for rows without.
        generator: Source of the random weights.
        num_answer_positions: Answer positions with an embedding of their own.

    Returns:
        Fresh networks.
    """

    def uniform(*shape: int, fan: int) -> Tensor:
        return (
            torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
        ) / math.sqrt(fan)

    def normal(rows: int, columns: int) -> Tensor:  # kaiming_normal_ of [1 rows columns]
        return torch.randn(
            rows, columns, generator=generator, dtype=torch.float32, device="cpu"
        ) * math.sqrt(2 / (rows * columns))

    def init_norm() -> Tensor:
        return torch.stack(
            [
                torch.ones(hidden_size, dtype=torch.float32, device="cpu"),
                torch.zeros(hidden_size, dtype=torch.float32, device="cpu"),
            ]
        )

    def init_attention(out: int) -> CrossAttention:
        return CrossAttention(
            query=uniform(feature_dim, feature_dim, fan=feature_dim),
            query_bias=uniform(feature_dim, fan=feature_dim),
            key=uniform(feature_dim, hidden_size, fan=hidden_size),
            value=uniform(out, hidden_size, fan=hidden_size),
            value_bias=uniform(out, fan=hidden_size),
        )

    def init_feature_network() -> FeatureNetwork:
        return FeatureNetwork(
            init_norm(),
            normal(num_query_tokens, feature_dim),
            init_attention(feature_dim),
            init_attention(feature_dim),
            init_norm(),
            normal(num_query_tokens, feature_dim),
            init_attention(feature_dim),
        )

    def init_factor_generator() -> FactorGenerator:
        answer_positions = torch.randn(
            num_answer_positions,
            hidden_size,
            generator=generator,
            dtype=torch.float32,
            device="cpu",
        )
        return FactorGenerator(
            init_norm(), normal(rank, feature_dim), init_attention(hidden_size), answer_positions
        )

    edit_features = init_feature_network()
    vision = edit_features.vision._replace(
        value_bias=torch.zeros_like(edit_features.vision.value_bias)
    )
    edit_features = edit_features._replace(vision=vision)
    query_features = pytree.tree_map(torch.clone, edit_features)  # each is trained on its own
    return LiveEditNetworks(
        edit_features,
        query_features,
        init_factor_generator(),
        init_factor_generator(),
        init_norm(),
        normal(num_sentinel_tokens, hidden_size),
        normal(num_text_sentinel_tokens, hidden_size),
    )


def fold_queries(network: FeatureNetwork, num_heads: int) -> FeatureExtractor:
    """Fold a feature network's constant queries into its key projections.

    query_(s,h) = W_k,h^T (W_q token_s + b)_h / sqrt(K/H)

    Args:
        network: The feature network.
        num_heads: H.

    Returns:
        An equivalent extractor.
    """
    return FeatureExtractor(
        prompt_norm=network.norm,
        prompt_queries=_fold_query_tokens(network.query_tokens, network.prompt, num_heads),
        prompt_value=network.prompt.value,
        prompt_value_bias=network.prompt.value_bias,
        vision_query=network.vision.query,
        vision_query_bias=network.vision.query_bias,
        vision_key=network.vision.key,
        vision_value=network.vision.value,
        vision_value_bias=network.vision.value_bias,
        query_norm=network.query_norm,
        query_queries=_fold_query_tokens(network.question_tokens, network.query, num_heads),
        query_value=network.query.value,
        query_value_bias=network.query.value_bias,
    )


def generate_factor(
    factor_generator: FactorGenerator,
    hidden_states: Tensor,
    token_mask: Tensor,
    position_index: Tensor,
    num_heads: int,
    expert_scale: float,
) -> Tensor:
    """Generate one low-rank factor of each row's expert.

    Args:
        factor_generator: Network of the factor.
        hidden_states: Output of the edited layer, [B L D].
        token_mask: Tokens to read, [B L].
        position_index: 1 at the prompt's last token, 2 at the answer's first, and so on; else 0, [B
            L].
        num_heads: Attention heads.
        expert_scale: Factor on the result.

    Returns:
        [B R D].
    """
    x = hidden_states.float()
    x = F.layer_norm(x, x.shape[-1:], factor_generator.norm[0], factor_generator.norm[1], EPS)
    num_positions = len(factor_generator.answer_positions)
    if num_positions:
        position_embeddings = factor_generator.answer_positions[
            (position_index - 1).clamp(0, num_positions - 1)
        ]
        x = x + torch.where((position_index > 0)[..., None], position_embeddings, 0)
    rows = _fold_query_tokens(factor_generator.query_tokens, factor_generator.attention, num_heads)
    out = cross_attention(
        rows,
        x,
        token_mask,
        factor_generator.attention.value,
        factor_generator.attention.value_bias,
        num_heads,
    )
    return out * (expert_scale / math.sqrt(len(factor_generator.query_tokens)))


def make_pool(
    networks: LiveEditNetworks,
    config: LiveEditConfig,
    hidden_states: Tensor,
    batch: Batch,
    answer_only: Tensor | None = None,
) -> ExpertPool:
    """Generate experts and keys from hidden states of edits; differentiable.

    Keys depend on the question alone. Factors are generated from image, prompt and answer.

    Args:
        networks: Networks.
        config: Settings.
        hidden_states: Output of the edited layer, [B L D].
        batch: Rows of the edits.
        answer_only: Rows whose factors see the prompt's last token and the answer alone, [B].

    Returns:
        One expert and its keys per row.
    """
    tokens = token_roles(batch)
    hidden_states = hidden_states.reshape(*batch.attention_mask.shape, -1)
    keys = routing_features(
        fold_queries(networks.edit_features, config.num_heads),
        hidden_states,
        tokens,
        config.num_heads,
    )
    modality_columns = torch.stack([keys.has_image, ~keys.has_image], 1).float()
    query = (
        torch.cat([keys.query, keys.vision], 1)
        if config.routing_input == "query_and_vision"
        else keys.query
    )
    token_mask = tokens.vision | tokens.prompt | tokens.answer
    if answer_only is not None:
        token_mask = torch.where(answer_only[:, None], batch.prompt_end | tokens.answer, token_mask)
    from_prompt_end = batch.prompt_end | tokens.answer
    position_index = torch.where(from_prompt_end, from_prompt_end.int().cumsum(1), 0)
    down, up = (
        generate_factor(
            maker, hidden_states, token_mask, position_index, config.num_heads, config.expert_scale
        )
        for maker in (networks.down, networks.up)
    )
    return ExpertPool(torch.cat([keys.vision, modality_columns], 1), query, down, up)


def _fold_query_tokens(query_tokens: Tensor, attention: CrossAttention, num_heads: int) -> Tensor:
    """[SH D]"""
    queries = F.linear(query_tokens, attention.query, attention.query_bias).unflatten(
        -1, (num_heads, -1)
    )
    queries = queries / math.sqrt(queries.shape[-1])
    keys = attention.key.unflatten(0, (num_heads, -1))  # [H K/H D]
    return torch.einsum("shk,hkd->shd", queries, keys).flatten(0, 1)
