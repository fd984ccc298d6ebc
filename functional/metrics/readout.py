"""What a model answers at scored positions: everything a metric needs, without the logits.

Logits are [B T V], with V up to 150,000; they are reduced to a `Readout` a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errata.functional.forward import batches, prefix
from errata.functional.types import IGNORE_INDEX, Batch, Inputs, Model

__all__ = ["Readout", "concat_readouts", "make_readout", "mean_kl", "read_out"]

_MAX_LOGITS = 1 << 25  # logits held at a time: 128 MB in fp32


def read_out(
    model: Model,
    source: Inputs | Batch,
    *,
    k: int = 1,
    all_positions: bool = False,
    edit_index: Tensor | None = None,
    return_logits: bool = False,
    base_logits: Tensor | None = None,
    known_logits: Tensor | None = None,
    scored_only: bool = False,
) -> Readout:
    """Read the scored positions of every row, without gradients: top-k tokens, NLL and KL.

    Args:
        model: The model, bound or not.
        source: Preprocessed inputs, or a batch.
        k: Tokens kept per position, the likeliest first.
        all_positions: Whether to keep the top-k of all positions too. The batch must not be
            reduced to scored positions.
        edit_index: [B], the edit of a bound stacked delta each row runs under.
        return_logits: Whether to keep the logits of the scored positions [B T V].
        base_logits: [B T V] of another model, for KL(base || model).
        known_logits: [B T V] of this model, if they are known. Then nothing is run.
        scored_only: Whether the last layer may run at scored positions only.

    Returns:
        The readout.

    Raises:
        ShapeError: If `all_positions` is asked of a batch that has scored positions only.
    """
    if known_logits is not None and not all_positions:
        readout = make_readout(known_logits, source.labels.to(known_logits.device), k)
        return readout._replace(logits=known_logits) if return_logits else readout
    with torch.no_grad():
        if isinstance(source, Inputs):
            source = model.embed(model.params, source, edit_index=edit_index)
        elif edit_index is not None:
            source = source._replace(edit_index=edit_index)
        length = source.hidden_states.shape[1] if all_positions else source.logit_positions.shape[1]
        size = max(1, _MAX_LOGITS // max(1, length * model.card.vocab_size))
        readouts = [
            _read_rows(
                model,
                source,
                slice(begin, begin + size),
                k,
                all_positions,
                return_logits,
                base_logits,
                scored_only,
            )
            for begin in range(0, max(1, source.num_rows), size)
        ]
    return concat_readouts(readouts)


def concat_readouts(readouts: Sequence[Readout]) -> Readout:
    """Concatenate readouts along the batch.

    Args:
        readouts: Readouts of equal fields.

    Returns:
        One readout of all rows.
    """
    fields = zip(*readouts)
    return Readout(*(None if f[0] is None else torch.cat(f) for f in fields))  # type: ignore[misc]


def _read_rows(
    model: Model,
    source: Batch,
    row_slice: slice,
    k: int,
    all_positions: bool,
    return_logits: bool,
    base_logits: Tensor | None,
    scored_only: bool,
) -> Readout:
    batch = batches.take_rows(source, row_slice)
    logits, all_top_ids = _decode_positions(model, batch, k, all_positions, scored_only)
    readout = make_readout(logits, batch.labels, k, all_top_ids)
    if base_logits is not None:
        width = min(base_logits.shape[1], logits.shape[1])  # positions beyond are padding in both
        scored_mask = (batch.labels != IGNORE_INDEX)[:, :width]
        readout = readout._replace(
            kl=mean_kl(base_logits[row_slice, :width], logits[:, :width], scored_mask)
        )
    return readout._replace(logits=logits) if return_logits else readout


def _decode_positions(
    model: Model, batch: Batch, k: int, all_positions: bool, scored_only: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits [B T V] of the scored positions, and the ranks [B L K] of all of them."""
    if not all_positions and scored_only:
        return prefix.decode_scored(model, batch), None
    if not all_positions:
        return model.decode(model.params, batch), None
    length = batch.hidden_states.shape[1]
    positions = torch.arange(length, device=batch.logit_positions.device, dtype=torch.int64).expand(
        batch.num_rows, length
    )
    logits = model.decode(model.params, batch, logit_positions=positions)  # [B L V]
    top_ids = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    all_top_ids = torch.where(batch.attention_mask[..., None], top_ids, -1)
    index = batch.logit_positions[..., None].expand(-1, -1, logits.shape[-1])
    return logits.gather(1, index), all_top_ids


class Readout(NamedTuple):
    """What one forward pass says about each row: enough for every scorer, small enough to keep."""

    labels: Tensor  # [B T] int64, IGNORE where nothing is scored
    top_ids: Tensor  # [B T K] int64, likeliest tokens first
    nll: Tensor  # [B T] -log p(label), 0 where ignored
    all_top_ids: Tensor | None = None  # [B L K] the same at every position, -1 after a row's end
    kl: Tensor | None = None  # [B] KL(base || this model), where the base's logits were at hand
    logits: Tensor | None = None  # [B T V], where they were asked for


def make_readout(
    logits: Tensor, labels: Tensor, k: int = 10, all_top_ids: Tensor | None = None
) -> Readout:
    """Reduce logits [B T V] that predict labels [B T] to what scorers need.

    Position t of `logits` predicts position t of `labels` (shift before the call).

    >>> out = make_readout(torch.tensor([[[0.0, 2.0, 1.0]]]), torch.tensor([[2]]), k=2)
    >>> out.top_ids.tolist(), round(float(out.nll), 3)
    ([[[1, 2]]], 1.408)

    Args:
        logits: [B T V].
        labels: Target ids, -100 where a position does not count, [B T].
        k: Ranks to keep; at most V.
        all_top_ids: Ids at every position [B L K], passed through; see `Readout`.

    Returns:
        Labels, top ids and negative log-likelihoods.
    """
    scored = labels != IGNORE_INDEX
    log_p = torch.log_softmax(logits.float(), dim=-1)
    gold = torch.where(scored, labels, 0)
    nll = -log_p.gather(-1, gold[..., None])[..., 0]
    top_ids = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return Readout(labels, top_ids, torch.where(scored, nll, 0.0), all_top_ids)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B T] where keep [B T]; a row that keeps nothing is NaN, never perfect."""
    mask = mask.to(torch.float32)
    return (values.float() * mask).sum(-1) / mask.sum(-1)


def mean_kl(base: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """KL(base || edited) = sum_v p (log p - log q), mean over kept positions, in nats.

    The locality loss of MEND, EasyEdit and LiveEdit, there pooled over all kept tokens of a batch.

    Args:
        base: Logits before the edit, [B T V].
        edited: Logits after it, [B T V].
        mask: Positions to keep, [B T].

    Returns:
        [B].
    """
    p, q = torch.log_softmax(base.float(), -1), torch.log_softmax(edited.float(), -1)
    return _masked_mean((p.exp() * (p - q)).sum(-1), mask)
