"""Losses over scored positions, in fp32, one value per row.

A position is scored if its label is not `IGNORE_INDEX`. Every loss is a mean over the scored tokens
of a row. The caller averages over rows, or over the rows of each edit (`mean_per_edit`). A row
without labels gives 0, with a gradient of 0. Legend: B rows · T positions · V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.types import IGNORE_INDEX

__all__ = ["kl", "margin_loss", "mean_over_scored", "nll", "scored_mask", "token_nll"]


def scored_mask(labels: Tensor) -> Tensor:
    """Return which positions are scored.

    Args:
        labels: [B T].

    Returns:
        [B T] bool.
    """
    return labels != IGNORE_INDEX


def mean_over_scored(values: Tensor, labels: Tensor) -> Tensor:
    """Average values over the scored positions of each row.

    Args:
        values: [B T].
        labels: [B T].

    Returns:
        [B], 0 for a row without labels.

    Example:
        >>> mean_over_scored(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[4, 5, IGNORE_INDEX]]))
        tensor([2.])
    """
    mask = scored_mask(labels)
    return torch.where(mask, values, 0).sum(-1) / mask.sum(-1).clamp_min(1)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log p(label) of every position.

    Args:
        logits: [B T V].
        labels: [B T].

    Returns:
        [B T] in nats, 0 at ignored positions.
    """
    flat = F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
    )
    return flat.view(labels.shape)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of each row's target tokens.

        L_b = - 1/|y_b| sum_t log softmax(z_bt)[y_bt]

    Args:
        logits: [B T V]; `logits[b, t]` predict `labels[b, t]` (`Inputs.logit_positions`).
        labels: [B T].

    Returns:
        [B] in nats.

    Example:
        >>> nll(torch.zeros(1, 2, 4), torch.tensor([[3, IGNORE_INDEX]]))
        tensor([1.3863])
    """
    return mean_over_scored(token_nll(logits, labels), labels)


def kl(base: Tensor, edited: Tensor, labels: Tensor) -> Tensor:
    """Compute KL(base || edited) = sum_v p (log p - log q), averaged over scored positions.

    Gradients flow to both arguments; detach `base` to keep it fixed.

    Args:
        base: Logits [B T V].
        edited: Logits [B T V].
        labels: [B T].

    Returns:
        [B] in nats.

    References:
        The locality loss of MEND (Mitchell et al. 2022) and later methods.

    Example:
        >>> kl(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.tensor([[0]]))
        tensor([0.])
    """
    log_p, log_q = base.float().log_softmax(-1), edited.float().log_softmax(-1)
    return mean_over_scored((log_p.exp() * (log_p - log_q)).sum(-1), labels)


def margin_loss(logits: Tensor, labels: Tensor, min_margin: float = 0.0) -> Tensor:
    """Measure how far each target token is from leading by `min_margin`, in logits.

        mean_t max(0, min_margin + max_{v != y_t} z_tv - z_ty)

    Exactly 0 if the target token leads by `min_margin` at every scored position.

    Args:
        logits: [B T V].
        labels: [B T].
        min_margin: The lead, in logits.

    Returns:
        [B].

    Example:
        >>> margin_loss(torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[1]]), min_margin=0.5)
        tensor([1.5000])
    """
    gold = torch.where(scored_mask(labels), labels, 0)[..., None]  # [B T 1]
    logits = logits.float()
    target_logits = logits.gather(-1, gold)[..., 0]
    is_target = (
        torch.arange(logits.shape[-1], device=logits.device, dtype=torch.int64) == gold
    )  # [B T V]
    best_other = logits.masked_fill(is_target, -torch.inf).amax(-1)
    return mean_over_scored((min_margin + best_other - target_logits).clamp_min(0), labels)
