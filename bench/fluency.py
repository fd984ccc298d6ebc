"""PPL_r: how fluently an edited model goes on after the fact it was taught."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional import Inputs, Model, Query
from errata.functional.answers import answers
from errata.functional.generate import continue_rows
from errata.functional.metrics import perplexity, perplexity_ratio
from errata.functional.types import IGNORE

__all__ = ["continued"]


def continued(
    model: Model, queries: Sequence[Query], num_tokens: int, edit: Tensor | None = None
) -> list[float]:
    """PPL_r = PPL(x | q, x*) / PPL(q, x*) per query, PPL(x) = exp(-1/T sum_i log p(x_i | x_<i)).

    q is the prompt as the model reads it, x* the target, x what the model says greedily behind it,
    up to `num_tokens` or the end of its turn. Placeholders of pictures, and a row's first token,
    have no probability and are left out of PPL(q, x*). NaN where the model says nothing more: a
    model that was taught to stop behind the target does. `edit` [B] picks from a stacked delta.

    The formula of ICE (arXiv 2406.11194); see `metrics.perplexity_ratio` for what its code does.

        continued(bind(model, delta), [query], 32)
    """
    inputs = model.read(queries, edit=edit)
    edit = edit if edit is None else edit.to(inputs.ids.device)
    said = continue_rows(model, inputs, num_tokens, edit=edit)
    longer, behind = _longer(inputs, said)
    with torch.no_grad():
        batch = model.embed(model.params, longer, edit=edit)
        # only now: edits that look for the end of the prompt must find it where it was
        scored = longer.mask[:, 1:] & ~longer.image[:, 1:]
        labels = torch.where(scored, longer.ids[:, 1:], IGNORE)  # [B L-1]
        at = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        found = answers(model, batch._replace(labels=labels, at=at))
        later = behind[:, 1:]
        given = perplexity(found.nll, scored & ~later)
        return perplexity_ratio(perplexity(found.nll, later), given).tolist()


def _longer(inputs: Inputs, said: Sequence[Sequence[int]]) -> tuple[Inputs, Tensor]:
    """The rows with what was said behind each, and where that stands [B L]."""
    more = max(1, *map(len, said))
    ids, mask = F.pad(inputs.ids, (0, more)), F.pad(inputs.mask, (0, more))
    behind = torch.zeros_like(mask)
    for row, (words, end) in enumerate(zip(said, inputs.mask.sum(-1).tolist())):
        place = slice(end, end + len(words))
        ids[row, place] = torch.tensor(list(words), dtype=ids.dtype, device=ids.device)
        behind[row, place] = True
    image = F.pad(inputs.image, (0, more))
    return inputs._replace(ids=ids, mask=mask | behind, image=image), behind
