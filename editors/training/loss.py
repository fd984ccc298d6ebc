"""The weighted sum of NLL and KL terms."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.editors.training.batches import TrainingBatch
from errata.functional import Model
from errata.functional.forward import prefix
from errata.functional.gradients.losses import kl, nll

__all__ = ["batch_loss", "combine_losses"]


def batch_loss(edited: Model, training_batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training batch under a model that carries its edits.

    Args:
        edited: Model with the edits bound.
        training_batch: Questions and what the loss needs.

    Returns:
        The loss, and each probe's mean by name.
    """
    if all(prefix.can_decode_scored(edited.card, delta.header) for delta in edited.deltas):
        logits = prefix.decode_scored(edited, training_batch.questions)
    else:
        logits = edited.decode(edited.params, training_batch.questions)
    num_target_rows = (
        training_batch.questions.num_rows - training_batch.base_logits.shape[0]
    )  # localities come last
    labels = training_batch.questions.labels
    return combine_losses(
        torch.cat(
            [
                nll(logits[:num_target_rows], labels[:num_target_rows]),
                kl(training_batch.base_logits, logits[num_target_rows:], labels[num_target_rows:]),
            ]
        ),
        training_batch,
    )


def combine_losses(
    values: Tensor, training_batch: TrainingBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Combine the losses of rows into that of the batch.

    Args:
        values: One per row, [B].
        training_batch: Says each row's probe, and each probe's weight.

    Returns:
        The loss, and each probe's mean by name.
    """
    terms = {}
    total = values.new_zeros(())
    for number, (name, weight) in enumerate(training_batch.loss_weights.items()):
        is_probe_row = training_batch.probe_index == number
        mean = torch.where(is_probe_row, values, 0).sum() / is_probe_row.sum().clamp_min(1)
        terms[name] = mean.detach()
        total = total + weight * mean
    return total, terms
