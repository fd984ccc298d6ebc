"""PPL_r: how fluently an edited model continues after the edited fact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional import Inputs, Model, Query
from errata.functional.forward.generation import generate_ids
from errata.functional.metrics.readout import read_out
from errata.functional.metrics.scorers import perplexity, perplexity_ratio
from errata.functional.types import IGNORE_INDEX

__all__ = ["perplexity_ratios"]


def perplexity_ratios(
    model: Model, queries: Sequence[Query], num_tokens: int, edit_index: Tensor | None = None
) -> list[float]:
    """PPL_r = PPL(x | q, x*) / PPL(q, x*) per query, PPL(x) = exp(-1/T sum_i log p(x_i | x_<i)).

    q is the prompt as the model reads it, x* the target, x the greedy continuation. Placeholders of
    images, and a row's first token, have no probability and are left out of PPL(q, x*). The formula
    of ICE (arXiv 2406.11194); see `metrics.perplexity_ratio` for what its code does.

        perplexity_ratios(bind(model, delta), [query], 32)

    Args:
        model: The edited model.
        queries: Queries with their targets.
        num_tokens: Tokens of the continuation, at most; it ends earlier at the end of the turn.
        edit_index: The edit of a stacked delta each query runs under, [B].

    Returns:
        One ratio per query; NaN where the model stops after the target.
    """
    inputs = model.preprocess(queries, edit_index=edit_index)
    edit_index = edit_index if edit_index is None else edit_index.to(inputs.input_ids.device)
    generated_ids = generate_ids(model, inputs, num_tokens, edit_index=edit_index)
    extended, is_generated = _append_ids(inputs, generated_ids)
    with torch.no_grad():
        batch = model.embed(model.params, extended, edit_index=edit_index)
        # only now: edits that look for the end of the prompt must find it where it was
        scored = extended.attention_mask[:, 1:] & ~extended.image_mask[:, 1:]
        labels = torch.where(scored, extended.input_ids[:, 1:], IGNORE_INDEX)  # [B L-1]
        logit_positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        readout = read_out(model, batch._replace(labels=labels, logit_positions=logit_positions))
        generated_mask = is_generated[:, 1:]
        prompt_perplexity = perplexity(readout.nll, scored & ~generated_mask)
        return perplexity_ratio(perplexity(readout.nll, generated_mask), prompt_perplexity).tolist()


def _append_ids(inputs: Inputs, generated_ids: Sequence[Sequence[int]]) -> tuple[Inputs, Tensor]:
    """The rows with their continuations, and a mask of these [B L]."""
    max_generated = max(1, *map(len, generated_ids))
    ids, mask = (
        F.pad(inputs.input_ids, (0, max_generated)),
        F.pad(inputs.attention_mask, (0, max_generated)),
    )
    is_generated = torch.zeros_like(mask)
    for row, (row_ids, end) in enumerate(
        zip(generated_ids, inputs.attention_mask.sum(-1).tolist())
    ):
        place = slice(end, end + len(row_ids))
        ids[row, place] = torch.tensor(list(row_ids), dtype=ids.dtype, device=ids.device)
        is_generated[row, place] = True
    image = F.pad(inputs.image_mask, (0, max_generated))
    return inputs._replace(
        input_ids=ids, attention_mask=mask | is_generated, image_mask=image
    ), is_generated
