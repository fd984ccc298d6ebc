"""What a model answers at scored positions: everything a metric needs, without the logits.

Logits are [B T V], with V up to 150,000; they are reduced to a `Reading` a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows
from .metrics import Reading, reading
from .types import Batch, Inputs, Model

__all__ = ["answers"]

_ELEMENTS = 1 << 25  # logits held at a time: 128 MB in fp32


def answers(
    model: Model,
    source: Inputs | Batch,
    *,
    k: int = 1,
    everywhere: bool = False,
    edit: Tensor | None = None,
) -> Reading:
    """Read a model at the scored positions of every row, without gradients.

    The `k` likeliest tokens and -log p(label) of each position; with `everywhere` also the k
    likeliest at all positions of each row (the peers' localities), for which the batch must not
    have been thinned. `edit` [B] says which edit of a bound stacked delta each row runs under.

        before, after = answers(model, batch), answers(bound, batch)
    """
    with torch.no_grad():
        if isinstance(source, Inputs):
            source = model.embed(model.params, source, edit=edit)
        elif edit is not None:
            source = source._replace(edit=edit)
        length = source.hidden.shape[1] if everywhere else source.at.shape[1]
        size = max(1, _ELEMENTS // max(1, length * model.card.vocab))
        parts = [
            _read(model, rows.take(source, slice(begin, begin + size)), k, everywhere)
            for begin in range(0, max(1, source.rows), size)
        ]
    whole = [part.whole for part in parts if part.whole is not None]
    return parts[0]._replace(
        labels=torch.cat([part.labels for part in parts]),
        top=torch.cat([part.top for part in parts]),
        nll=torch.cat([part.nll for part in parts]),
        whole=torch.cat(whole) if whole else None,
    )


def _read(model: Model, batch: Batch, k: int, everywhere: bool) -> Reading:
    if not everywhere:
        return reading(model.decode(model.params, batch), batch.labels, k)
    length = batch.hidden.shape[1]
    at = torch.arange(length, device=batch.at.device).expand(batch.rows, length)
    logits = model.decode(model.params, batch, at=at)  # [B L V]
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    whole = torch.where(batch.mask[..., None], top, -1)
    index = batch.at[..., None].expand(-1, -1, logits.shape[-1])
    return reading(logits.gather(1, index), batch.labels, k, whole)
