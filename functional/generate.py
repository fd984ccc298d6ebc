"""Greedy generation with a key-value cache, for a base or a bound model, one edit per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BadInput, ModelUnsupported
from .types import Inputs, Model, Query

__all__ = ["continue_rows", "generate"]


def generate(
    model: Model,
    queries: Sequence[Query],
    max_new_tokens: int = 16,
    *,
    stop: Sequence[int] | None = None,
    edit: Tensor | None = None,
) -> list[str]:
    """What the model says to each query, word after word the likeliest; targets are not read.

    Rows end at the first token of `stop` (default: the card's), which is left out. `edit` [B] says
    which edit of a bound stacked delta each row runs under. Raises BadInput when a row could
    outgrow the context.

        generate(bind(model, delta), [Query("What is this?", images=(picture,))])
    """
    inputs = model.read([query._replace(target="") for query in queries], edit=edit)
    longest = inputs.ids.shape[1]
    if longest + max_new_tokens > model.card.context:
        raise BadInput(
            f"prompt and answer must fit into {model.card.context} tokens; the longest prompt has "
            f"{longest} and {max_new_tokens} new ones are asked for: shorten one of them."
        )
    said = continue_rows(model, inputs, max_new_tokens, stop=stop, edit=edit)
    return [model.write(ids) for ids in said]


def continue_rows(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int,
    *,
    stop: Sequence[int] | None = None,
    edit: Tensor | None = None,
) -> list[list[int]]:
    """The token ids that follow each row, up to and without its stop token.

    The prompt runs once and leaves its keys and values; then each step runs one token per row. One
    number per step leaves the device: whether all rows have ended.
    """
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    device = inputs.ids.device
    ends = torch.tensor(tuple(model.card.stop if stop is None else stop), device=device).long()
    said: list[Tensor] = []
    with torch.no_grad():
        done = torch.zeros(len(inputs.ids), dtype=torch.bool, device=device)
        for logits in _steps(model, inputs, said, edit):
            said.append(logits[:, -1].argmax(-1))  # [B]
            done = done | torch.isin(said[-1], ends)
            if len(said) == max_new_tokens or bool(done.all()):
                break
    return [_until(row, set(ends.tolist())) for row in torch.stack(said, 1).tolist()]


def _steps(
    model: Model, inputs: Inputs, said: list[Tensor], edit: Tensor | None
) -> Iterator[Tensor]:
    """The logits [B 1 V] of each next token, given what has been said since the last."""
    batch = model.embed(model.params, inputs, edit=edit)
    last = inputs.mask.sum(-1, keepdim=True) - 1  # [B 1]
    try:
        logits, past = model.decode(model.params, batch, at=last, keep=True)
    except ModelUnsupported:  # a family whose layers take no cache of ours
        yield from _steps_again(model, inputs, said, edit)
        return
    yield logits
    while True:
        batch = model.extend(model.params, said[-1][:, None], past, edit=batch.edit)
        here = torch.zeros_like(last)
        logits, past = model.decode(model.params, batch, at=here, past=past, keep=True)
        yield logits


def _steps_again(
    model: Model, inputs: Inputs, said: list[Tensor], edit: Tensor | None
) -> Iterator[Tensor]:
    """The same without a cache: every step runs the rows from their beginning."""
    while True:
        batch = model.embed(model.params, inputs, edit=edit)
        yield model.decode(model.params, batch, at=inputs.mask.sum(-1, keepdim=True) - 1)
        inputs = _grown(inputs, said[-1])


def _grown(inputs: Inputs, ids: Tensor) -> Inputs:
    """The rows with one more token each, right behind their last; it counts as their answer's."""
    end = inputs.mask.sum(-1, keepdim=True)  # [B 1]
    return inputs._replace(
        ids=F.pad(inputs.ids, (0, 1)).scatter(1, end, ids[:, None]),
        mask=F.pad(inputs.mask, (0, 1)).scatter(1, end, True),
        image=F.pad(inputs.image, (0, 1)),
        labels=torch.cat([inputs.labels, ids[:, None]], 1),
        at=torch.cat([inputs.at, end - 1], 1),
    )


def _until(ids: list[int], ends: set[int]) -> list[int]:
    cut = next((n for n, token in enumerate(ids) if token in ends), len(ids))
    return ids[:cut]
