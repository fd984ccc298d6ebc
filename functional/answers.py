"""What a model answers at scored positions: everything a metric needs, without the logits.

Logits are [B T V], with V up to 150,000; they are reduced to a `Reading` a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import prefix, rows
from .metrics import Readout, make_readout, mean_kl
from .types import IGNORE_INDEX, Batch, Inputs, Model

__all__ = ["read_out", "concat_readouts"]

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
    """Read a model at the scored positions of every row, without gradients.

    The `k` likeliest tokens and -log p(label) of each position; with `everywhere` also the k
    likeliest at all positions of each row (the peers' localities), for which the batch must not
    have been thinned. `edit` [B] says which edit of a bound stacked delta each row runs under. With
    `logits` those of the scored positions are kept [B T V]; given as another model's `base`, they
    make the reading say KL(base || model). `given` are the model's own logits at the scored
    positions [B T V], where they are known already: then nothing is run. `narrow`: see `prefix`.

        before = answers(model, batch, logits=True)
        after = answers(bound, batch, base=before.logits)
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
    """Readings of one kind, row after row."""
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
    batch = rows.take_rows(source, row_slice)
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
    positions = torch.arange(length, device=batch.logit_positions.device).expand(
        batch.num_rows, length
    )
    logits = model.decode(model.params, batch, logit_positions=positions)  # [B L V]
    top_ids = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    all_top_ids = torch.where(batch.attention_mask[..., None], top_ids, -1)
    index = batch.logit_positions[..., None].expand(-1, -1, logits.shape[-1])
    return logits.gather(1, index), all_top_ids
