"""Greedy generation with a key-value cache, for a base or a bound model, one edit per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import BadInput
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
    inputs = model.read([query._replace(target="") for query in queries])
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
    ends = torch.tensor(
        list(model.card.stop if stop is None else stop), device=inputs.ids.device, dtype=torch.long
    )
    with torch.no_grad():
        batch = model.embed(model.params, inputs, edit=edit)
        last = inputs.mask.sum(-1, keepdim=True) - 1  # [B 1]
        logits, past = model.decode(model.params, batch, at=last, keep=True)
        said: list[Tensor] = []
        done = torch.zeros(batch.rows, dtype=torch.bool, device=inputs.ids.device)
        for number in range(max_new_tokens):
            ids = logits[:, -1].argmax(-1)  # [B]
            said.append(ids)
            done = done | torch.isin(ids, ends)
            if number + 1 == max_new_tokens or bool(done.all()):
                break
            batch = model.extend(model.params, ids[:, None], past, edit=batch.edit)
            logits, past = model.decode(
                model.params, batch, at=torch.zeros_like(last), past=past, keep=True
            )
    return [_until(row, set(ends.tolist())) for row in torch.stack(said, 1).tolist()]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    cut = next((n for n, token in enumerate(ids) if token in ends), len(ids))
    return ids[:cut]
