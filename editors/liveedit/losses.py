"""Losses of LiveEdit's training: routing terms, and the total of a batch.

With a_bm = scale <f_b, E_m> the similarity of question b to expert m, t_b that to the sentinel, and
s_bm = scale <g_b, G_m>, for questions that their own edit e should reach, and for localities:

    soft     -log softmax_m(s_b)_e - log sigmoid(s_be),    - mean_m log(1 - sigmoid(s_bm)) of others
    hard     -log softmax over [a_b1 .. a_bE, t_b] at e,   at the sentinel for a locality
    margin   w log(1 + e^(t_b - a_be)),                    log(1 + sum_m e^(a_bm - t_b)) of others

with w = `IN_SCOPE_WEIGHT`. Source: qizhou000/LiveEdit `editor/vllm_editors/liveedit/liveedit.py`,
`train_a_batch`. Legend: B questions · E edits of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.editors.liveedit.networks import ExpertPool, LiveEditNetworks, fold_queries, make_pool
from errata.editors.training.batches import TrainingBatch
from errata.editors.training.loss import combine_losses
from errata.functional import Batch, Model
from errata.functional.forward import batches, prefix
from errata.functional.gradients.losses import kl, nll
from errata.functional.kinds.experts.apply import (
    EPS,
    RoutingFeatures,
    routing_features,
    score_scale,
    token_roles,
    with_modality_columns,
)
from errata.kernels.lora_moe import ref as lora_moe

if TYPE_CHECKING:
    from errata.editors.liveedit.config import LiveEditConfig

__all__ = [
    "RoutingScores",
    "hard_gate_loss",
    "liveedit_loss",
    "margin_loss",
    "routing_scores",
    "soft_gate_loss",
]


MIN_EXPERT_WEIGHT = 1e-4  # the weight of all experts together below which a row is as the base's


IN_SCOPE_WEIGHT = (
    6.0  # how much worse it is to shut out a question than to let in one that the soft
)
# weights still turn away
ANSWER_ONLY_RATIO = (
    0.5  # the share of edits whose makers see the answer alone, and cannot learn it by heart
)


class RoutingScores(NamedTuple):
    """How alike questions are to edits, in the units of the gate."""

    vision: Tensor  # [B E]
    sentinel: Tensor  # [B]
    query: Tensor  # [B E]


def soft_gate_loss(
    query_scores: Tensor, edit_index: Tensor, in_scope: Tensor, is_routable: Tensor
) -> Tensor:
    """Loss of the soft router: raise the weight of the own expert, lower those of all others.

    Args:
        query_scores: Score of each expert, [B E].
        edit_index: The edit of each row, [B].
        in_scope: Rows that the edit should reach, [B].
        is_routable: Experts a row can be routed to, [B E].

    Returns:
        [B].
    """
    is_own = F.one_hot(edit_index, query_scores.shape[1]).bool() & in_scope[:, None]
    routable_scores = torch.where(is_routable, query_scores, -torch.inf)
    relative = torch.where(
        in_scope, -torch.where(is_own, routable_scores.log_softmax(1), 0).sum(1), 0
    )
    own_loss = -torch.where(is_own, F.logsigmoid(query_scores), 0).sum(1)
    others = is_routable & ~is_own
    other_loss = -torch.where(others, F.logsigmoid(-query_scores), 0).sum(1) / others.sum(
        1
    ).clamp_min(1)
    return relative + own_loss + other_loss


def hard_gate_loss(scores: RoutingScores, edit_index: Tensor, in_scope: Tensor) -> Tensor:
    """Cross-entropy of the gate's choice: the own expert, or the sentinel for localities.

    Args:
        scores: Routing scores.
        edit_index: The edit of each row, [B].
        in_scope: Rows that the edit should reach, [B].

    Returns:
        [B].
    """
    logits = torch.cat([scores.vision, scores.sentinel[:, None]], 1)  # [B E+1]
    return F.cross_entropy(
        logits, torch.where(in_scope, edit_index, scores.vision.shape[1]), reduction="none"
    )


def margin_loss(
    scores: RoutingScores, edit_index: Tensor, in_scope: Tensor, margin: float = 0.0
) -> Tensor:
    """Margins of the own expert above the sentinel and of all others below it.

    Args:
        scores: Routing scores.
        edit_index: The edit of each row, [B].
        in_scope: Rows that the edit should reach, [B].
        margin: Margin asked for, in units of the score.

    Returns:
        [B].
    """
    above = scores.vision - scores.sentinel[:, None]  # [B E]
    is_own = F.one_hot(edit_index, above.shape[1]).bool() & in_scope[:, None]
    own_loss = F.softplus(margin - torch.where(is_own, above, 0).sum(1)) * in_scope
    other_loss = F.softplus(margin + torch.where(is_own, -torch.inf, above).logsumexp(1))
    return IN_SCOPE_WEIGHT * own_loss + other_loss


def liveedit_loss(
    config: LiveEditConfig, model: Model, networks: LiveEditNetworks, training_batch: TrainingBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training batch, whose rows are cached after the edited layer.

    Args:
        config: Settings.
        model: Model to edit.
        networks: Networks to train.
        training_batch: Edits and the questions about them.

    Returns:
        The loss, and its terms by name.
    """
    questions, num_heads = training_batch.questions, config.num_heads
    generator = torch.Generator().manual_seed(training_batch.seed)
    answer_only = torch.rand(
        len(training_batch.queries), generator=generator, dtype=torch.float32, device="cpu"
    ) < (ANSWER_ONLY_RATIO if training_batch.seed else 0)
    pool = make_pool(
        networks,
        config,
        training_batch.edits.hidden_states,
        training_batch.edits,
        answer_only.to(questions.hidden_states.device),
    )
    question_features = routing_features(
        fold_queries(networks.query_features, num_heads),
        questions.hidden_states,
        token_roles(questions),
        num_heads,
        (networks.sentinel, networks.sentinel_text),
    )
    scores = routing_scores(config, question_features, pool)
    edit_index = questions.edit_index
    in_scope = (
        torch.arange(questions.num_rows, device=edit_index.device, dtype=torch.int64)
        < questions.num_rows - training_batch.base_logits.shape[0]
    )
    is_routable = question_features.has_image[:, None] == (pool.vision_keys[:, -2] > 0)
    routing = {
        "soft": soft_gate_loss(scores.query, edit_index, in_scope, is_routable).mean(),
        "hard": hard_gate_loss(scores, edit_index, in_scope).mean(),
        "apart": margin_loss(scores, edit_index, in_scope, config.margin).mean(),
    }
    weights = lora_moe.expert_weights(
        scores.query,
        _sample_active_experts(training_batch, edit_index, in_scope, generator) & is_routable,
    )
    hidden_states = _apply_expert_pool(networks, pool, weights, questions.hidden_states)
    has_experts = weights.detach().sum(1) > MIN_EXPERT_WEIGHT
    values = _answer_losses(
        model, training_batch, questions._replace(hidden_states=hidden_states), has_experts
    )
    total, terms = combine_losses(values, training_batch)
    total = total + sum(routing.values())
    return total, {**terms, **{name: value.detach() for name, value in routing.items()}}


def _apply_expert_pool(
    networks: LiveEditNetworks, pool: ExpertPool, weights: Tensor, hidden_states: Tensor
) -> Tensor:
    """h + sum_m w_m relu(LN(h) A_m^T) B_m, all rows with the same pool, as two products."""
    normed = F.layer_norm(
        hidden_states.float(),
        hidden_states.shape[-1:],
        networks.input_norm[0],
        networks.input_norm[1],
        EPS,
    )
    inner = F.relu(normed @ pool.down.flatten(0, 1).mT)  # [B L ER]
    inner = inner * weights.repeat_interleave(pool.down.shape[1], 1)[:, None]
    return (hidden_states + inner @ pool.up.flatten(0, 1)).to(hidden_states.dtype)


def _answer_losses(
    model: Model, training_batch: TrainingBatch, questions: Batch, has_experts: Tensor
) -> Tensor:
    """[B] NLL where edits should reach, KL of localities; 0 for rows that need not be run.

    These are localities whose experts are not felt, most of them once routing is learned, and rows
    of a probe that weighs nothing: those train routing alone.
    """
    num_target_rows = questions.num_rows - training_batch.base_logits.shape[0]
    weights = torch.tensor(
        list(training_batch.loss_weights.values()), device=has_experts.device, dtype=torch.float32
    )[training_batch.probe_index]
    in_scope = (
        torch.arange(questions.num_rows, device=has_experts.device, dtype=torch.int64)
        < num_target_rows
    )
    row_indices = ((in_scope | has_experts) & (weights > 0)).nonzero()[:, 0]
    run_batch = batches.take_rows(questions, row_indices)
    logits, labels = prefix.decode_scored(model, run_batch), run_batch.labels
    num_nll_rows = int((in_scope & (weights > 0)).sum())
    base = training_batch.base_logits[row_indices[num_nll_rows:] - num_target_rows]
    losses = [
        nll(logits[:num_nll_rows], labels[:num_nll_rows]),
        kl(base, logits[num_nll_rows:], labels[num_nll_rows:]),
    ]
    return logits.new_zeros(questions.num_rows).index_copy(0, row_indices, torch.cat(losses))


def routing_scores(
    config: LiveEditConfig, question_features: RoutingFeatures, pool: ExpertPool
) -> RoutingScores:
    """Similarity of questions and edits; -1e28 and less where their modalities differ.

    Args:
        config: Settings.
        question_features: Features of the questions.
        pool: Keys of the edits.

    Returns:
        Scores of every expert and of the sentinel.
    """
    scale = score_scale(config.num_query_tokens, config.feature_dim)
    query = question_features.query
    if config.routing_input == "query_and_vision":
        query = torch.cat([query, question_features.vision], 1)
    return RoutingScores(
        vision=scale
        * with_modality_columns(question_features.vision, question_features.has_image)
        @ pool.vision_keys.mT,
        sentinel=scale * (question_features.vision * question_features.sentinel).sum(1),
        query=scale * query @ pool.query_keys.mT,
    )


def _sample_active_experts(
    training_batch: TrainingBatch, edit_index: Tensor, in_scope: Tensor, generator: torch.Generator
) -> Tensor:
    """[B E] the experts that act on each row: 0 to E random ones, and its own where it should."""
    count = len(training_batch.queries)
    order = torch.rand(
        len(edit_index), count, generator=generator, dtype=torch.float32, device="cpu"
    ).argsort(1)
    num_active = torch.randint(
        0, count + 1, (len(edit_index), 1), generator=generator, dtype=torch.int64, device="cpu"
    )
    is_own = F.one_hot(edit_index, count).bool() & in_scope[:, None]
    return (order < num_active).to(edit_index.device) | is_own
