"""What a model answers at scored positions: everything a metric needs, without the logits.

Logits are [B T V], with V up to 150,000; they are reduced to a `Reading` a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import prefix, rows
from .metrics import Reading, divergence, reading
from .types import IGNORE, Batch, Inputs, Model

__all__ = ["answers", "join"]

_ELEMENTS = 1 << 25  # logits held at a time: 128 MB in fp32


def answers(
    model: Model,
    source: Inputs | Batch,
    *,
    k: int = 1,
    everywhere: bool = False,
    edit: Tensor | None = None,
    logits: bool = False,
    base: Tensor | None = None,
    given: Tensor | None = None,
    narrow: bool = False,
) -> Reading:
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
    if given is not None and not everywhere:
        made = reading(given, source.labels.to(given.device), k)
        return made._replace(logits=given) if logits else made
    with torch.no_grad():
        if isinstance(source, Inputs):
            source = model.embed(model.params, source, edit=edit)
        elif edit is not None:
            source = source._replace(edit=edit)
        length = source.hidden.shape[1] if everywhere else source.at.shape[1]
        size = max(1, _ELEMENTS // max(1, length * model.card.vocab))
        parts = [
            _read(model, source, slice(begin, begin + size), k, everywhere, logits, base, narrow)
            for begin in range(0, max(1, source.rows), size)
        ]
    return join(parts)


def join(parts: Sequence[Reading]) -> Reading:
    """Readings of one kind, row after row."""
    fields = zip(*parts)
    return Reading(*(None if f[0] is None else torch.cat(f) for f in fields))  # type: ignore[misc]


def _read(
    model: Model,
    source: Batch,
    some: slice,
    k: int,
    everywhere: bool,
    logits: bool,
    base: Tensor | None,
    narrow: bool,
) -> Reading:
    batch = rows.take(source, some)
    found, whole = _decoded(model, batch, k, everywhere, narrow)
    made = reading(found, batch.labels, k, whole)
    if base is not None:
        width = min(base.shape[1], found.shape[1])  # positions beyond are padding in both
        keep = (batch.labels != IGNORE)[:, :width]
        made = made._replace(kl=divergence(base[some, :width], found[:, :width], keep))
    return made._replace(logits=found) if logits else made


def _decoded(
    model: Model, batch: Batch, k: int, everywhere: bool, narrow: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits [B T V] of the scored positions, and the ranks [B L K] of all of them."""
    if not everywhere and narrow:
        return prefix.narrow(model, batch), None
    if not everywhere:
        return model.decode(model.params, batch), None
    length = batch.hidden.shape[1]
    at = torch.arange(length, device=batch.at.device).expand(batch.rows, length)
    logits = model.decode(model.params, batch, at=at)  # [B L V]
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    whole = torch.where(batch.mask[..., None], top, -1)
    index = batch.at[..., None].expand(-1, -1, logits.shape[-1])
    return logits.gather(1, index), whole
