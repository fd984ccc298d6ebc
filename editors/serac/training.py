"""SERAC's losses and its `TrainableEditor`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.editors.serac.config import SeracConfig
from errata.editors.serac.editor import (
    SeracState,
    _answer_outputs,
    _compatibility,
    _embedding_name,
    _trained_weights,
    serac_editor,
)
from errata.editors.training.batches import TrainingBatch
from errata.editors.training.trainable import TrainableEditor
from errata.functional import Model
from errata.functional.forward import batches, prefix
from errata.functional.gradients.losses import kl, nll, scored_mask
from errata.functional.kinds.scope.apply import logits_from_states, mix_logits
from errata.functional.kinds.scope.network import (
    EditMemory,
    classify_scope,
    counterfactual_states,
    encode_edit,
    network_inputs,
    read_answer,
)

__all__ = ["scope_loss", "serac_trainable"]


def serac_trainable(config: SeracConfig = SeracConfig()) -> TrainableEditor:
    """How SERAC is trained by `fit`: the cases of a batch form one memory, which all questions see.

    Args:
        config: Settings.

    Returns:
        The editor with its loss and sites.
    """
    editor = serac_editor(config)

    def prepare(model: Model, state: SeracState, training_batch: TrainingBatch, is_training: bool):
        return state, (
            training_batch,
            _answer_outputs(model, state.unembedding_map, training_batch.edits),
        )

    def loss(model: Model, state: SeracState, prepared: tuple[TrainingBatch, Tensor]):
        training_batch, answer_outputs = prepared
        network, edits, questions = state.network, training_batch.edits, training_batch.questions
        edit_inputs = network_inputs(network, edits)
        memory = encode_edit(network, edit_inputs, edits.logit_positions, scored_mask(edits.labels))
        question_inputs = network_inputs(network, questions)
        max_words = int(
            (questions.attention_mask & ~questions.image_mask).sum(1).max()
        )  # words of any question, at least
        keys = (
            classify_scope(network, config.num_heads, edit_inputs, max_words),
            classify_scope(network, config.num_heads, question_inputs, max_words),
        )
        distances = (keys[1][:, None] - keys[0]).square().sum(-1)  # [B E]
        num_in_scope = (
            questions.num_rows - training_batch.base_logits.shape[0]
        )  # localities come last
        scope_losses, closest_edit = scope_loss(
            distances, questions.edit_index, num_in_scope, config
        )
        num_answered = questions.num_rows if config.gate == "soft" else num_in_scope
        edit_of_row = torch.cat(
            [questions.edit_index[:num_in_scope], closest_edit[num_in_scope:num_answered]]
        )
        answered_inputs = type(question_inputs)(*(part[:num_answered] for part in question_inputs))
        batch = batches.take_rows(questions, slice(0, num_answered))
        row_memory = EditMemory(*(part[edit_of_row] for part in memory))
        states, pointer = counterfactual_states(
            network, config.num_heads, answered_inputs, row_memory
        )
        positions = batch.logit_positions[..., None]
        states = states.gather(1, positions.expand(-1, -1, states.shape[-1]))
        pointer = pointer.gather(1, positions.expand(-1, -1, pointer.shape[-1]))
        head_inputs = read_answer(network, states, pointer, answer_outputs[edit_of_row]).to(
            batch.hidden_states.dtype
        )
        logits = logits_from_states(model, model.params, head_inputs, batch.edit_index)
        answer_losses = nll(logits[:num_in_scope], batch.labels[:num_in_scope])
        locality_losses = answer_losses.new_zeros(questions.num_rows - num_in_scope)
        if config.gate == "soft":
            gate = torch.exp(-distances[num_in_scope:].amin(1))[:, None].expand(
                batch.labels[num_in_scope:].shape
            )
            mixed_logits = mix_logits(training_batch.base_logits, logits[num_in_scope:], gate)
            locality_losses = kl(
                training_batch.base_logits, mixed_logits, batch.labels[num_in_scope:]
            )
        return _combine_losses(
            training_batch, torch.cat([answer_losses, locality_losses]), scope_losses
        )

    return TrainableEditor(
        editor=editor,
        loss=loss,
        sites=lambda model: (_embedding_name(model)[0].rpartition(".")[0],),
        parameters=lambda state: state.network,
        with_parameters=lambda state, network: state._replace(network=network, is_trained=True),
        prepare=prepare,
        weights=_trained_weights,
        compatibility=lambda model: _compatibility(model, config),
        append_eos=config.append_eos,
        edit_depth=prefix.EditDepth(),
    )


def scope_loss(
    distances: Tensor, edit_index: Tensor, num_in_scope: int, config: SeracConfig = SeracConfig()
) -> tuple[Tensor, Tensor]:
    """The classifier's loss of each question, and the edit it finds most similar.

    With s = exp(-distance) and l(s) = -log s for a soft gate,

        l(s_own) + l(1 - max of the others')     in scope
        l(1 - max s)                             out of it

    Half of the loss is of what an edit should reach, half of what it should not: balanced, as in
    serac's `losses.py`. A hard gate asks on which side of its threshold t a similarity lies, and
    -log s still pulls where that is settled, so l(s) = log(1 + exp(8 (distance + log t))) there and
    l(1 - s) = log(1 + exp(-8 (distance + log t))).

    Args:
        distances: Squared distances of questions and edits, [B E].
        edit_index: The edit of each question, [B].
        num_in_scope: The first so many questions are in the scope of their edit, the others of
            none.
        config: Settings.

    Returns:
        Losses [B] and the most similar edit of each question [B].
    """
    edits = torch.arange(distances.shape[1], device=distances.device, dtype=torch.int64)
    in_scope = (
        torch.arange(len(distances), device=distances.device, dtype=torch.int64) < num_in_scope
    )
    is_own = (edits == edit_index[:, None]) & in_scope[:, None]
    # one edit alone has no others: it is as if they were far
    others = torch.where(is_own, torch.inf, distances).amin(1).clamp(1e-6, 50.0)
    own_distance = torch.where(is_own, distances, 0).sum(1)
    if config.gate == "soft":
        return own_distance - torch.log(-torch.expm1(-others)), distances.argmin(1)
    threshold_distance = -math.log(max(config.threshold, 1e-6))
    in_scope_loss = torch.where(
        in_scope, F.softplus(GATE_SHARPNESS * (own_distance - threshold_distance)), 0
    )
    return in_scope_loss + F.softplus(
        GATE_SHARPNESS * (threshold_distance - others)
    ), distances.argmin(1)


GATE_SHARPNESS = 8.0  # how steep a hard gate's loss is about its threshold


def _combine_losses(
    training_batch: TrainingBatch, answer_losses: Tensor, scope_losses: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    terms = {}
    total = answer_losses.new_zeros(())
    for number, (name, weight) in enumerate(training_batch.loss_weights.items()):
        is_probe_row = training_batch.probe_index == number
        count = is_probe_row.sum().clamp_min(1)
        answer_loss, gate_loss = (
            torch.where(is_probe_row, x, 0).sum() / count for x in (answer_losses, scope_losses)
        )
        terms[name] = answer_loss.detach()
        terms[f"{name} scope"] = gate_loss.detach()
        total = total + weight * (answer_loss + gate_loss)
    return total, terms
