"""Greedy generation with a key-value cache, for a base or a bound model, one edit per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.errors import InvalidInputError, UnsupportedModelError
from errata.functional.queries import Query
from errata.functional.types import Inputs, Model

__all__ = ["generate", "generate_ids"]


def generate(
    model: Model,
    queries: Sequence[Query],
    max_new_tokens: int = 16,
    *,
    stop_ids: Sequence[int] | None = None,
    edit_index: Tensor | None = None,
) -> list[str]:
    """Generate an answer to each query by greedy decoding. Targets are not read.

    Args:
        model: The model, bound or not.
        queries: One per row.
        max_new_tokens: Most tokens of an answer.
        stop_ids: Token ids that end an answer and are not part of it. Defaults to the card's.
        edit_index: [B], the edit of a bound stacked delta each row runs under.

    Returns:
        One text per query.

    Raises:
        InvalidInputError: If `max_new_tokens` is below 1, or a row could exceed the context.

    Example:
        >>> from errata import adapters
        >>> model = adapters.load_micro("llava")
        >>> len(generate(model, [Query("who is it?"), Query("where is it?")], max_new_tokens=2))
        2
    """
    inputs = model.preprocess(
        [query._replace(target="") for query in queries], edit_index=edit_index
    )
    longest = inputs.input_ids.shape[1]
    if longest + max_new_tokens > model.card.max_positions:
        raise InvalidInputError(
            f"prompt and answer must fit into {model.card.max_positions} tokens; the longest "
            "prompt has "
            f"{longest} and {max_new_tokens} new ones are asked for: shorten one of them."
        )
    generated = generate_ids(
        model, inputs, max_new_tokens, stop_ids=stop_ids, edit_index=edit_index
    )
    return [model.detokenize(token_ids) for token_ids in generated]


def generate_ids(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] | None = None,
    edit_index: Tensor | None = None,
) -> list[list[int]]:
    """Generate the token ids that follow each row by greedy decoding.

    The prompt runs once and fills a key-value cache; then each step runs one token per row. Each
    step copies one number from the device: whether all rows have ended.

    Args:
        model: The model, bound or not.
        inputs: Rows that end with the prompt.
        max_new_tokens: Most tokens of an answer.
        stop_ids: Token ids that end an answer. Defaults to the card's.
        edit_index: [B], the edit of a bound stacked delta each row runs under.

    Returns:
        Token ids per row, without the stop token.

    Raises:
        InvalidInputError: If `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    device = inputs.input_ids.device
    stop_tokens = torch.tensor(
        tuple(model.card.stop_ids if stop_ids is None else stop_ids),
        device=device,
        dtype=torch.int64,
    ).long()
    new_ids: list[Tensor] = []
    with torch.no_grad():
        done = torch.zeros(len(inputs.input_ids), dtype=torch.bool, device=device)
        for logits in _steps(model, inputs, new_ids, edit_index):
            new_ids.append(logits[:, -1].argmax(-1))  # [B]
            done = done | torch.isin(new_ids[-1], stop_tokens)
            if len(new_ids) == max_new_tokens or bool(done.all()):
                break
    return [
        _cut_at_stop(row, set(stop_tokens.tolist())) for row in torch.stack(new_ids, 1).tolist()
    ]


def _steps(
    model: Model, inputs: Inputs, new_ids: list[Tensor], edit_index: Tensor | None
) -> Iterator[Tensor]:
    """Yield the logits [B 1 V] of each next token; `new_ids` grows between steps."""
    batch = model.embed(model.params, inputs, edit_index=edit_index)
    last = inputs.attention_mask.sum(-1, keepdim=True) - 1  # [B 1]
    try:
        logits, kv_cache = model.decode(
            model.params, batch, logit_positions=last, return_cache=True
        )
    except UnsupportedModelError:  # a family whose layers do not take our cache
        yield from _steps_without_cache(model, inputs, new_ids, edit_index)
        return
    yield logits
    while True:
        batch = model.embed_next(
            model.params, new_ids[-1][:, None], kv_cache, edit_index=batch.edit_index
        )
        logit_positions = torch.zeros_like(last)
        logits, kv_cache = model.decode(
            model.params,
            batch,
            logit_positions=logit_positions,
            kv_cache=kv_cache,
            return_cache=True,
        )
        yield logits


def _steps_without_cache(
    model: Model, inputs: Inputs, new_ids: list[Tensor], edit_index: Tensor | None
) -> Iterator[Tensor]:
    """Yield the same logits without a cache: every step runs whole rows."""
    while True:
        batch = model.embed(model.params, inputs, edit_index=edit_index)
        yield model.decode(
            model.params, batch, logit_positions=inputs.attention_mask.sum(-1, keepdim=True) - 1
        )
        inputs = _append_token(inputs, new_ids[-1])


def _append_token(inputs: Inputs, token_ids: Tensor) -> Inputs:
    """Append one token to each row, directly after its last; it counts as part of the answer."""
    length = inputs.attention_mask.sum(-1, keepdim=True)  # [B 1]
    return inputs._replace(
        input_ids=F.pad(inputs.input_ids, (0, 1)).scatter(1, length, token_ids[:, None]),
        attention_mask=F.pad(inputs.attention_mask, (0, 1)).scatter(1, length, True),
        image_mask=F.pad(inputs.image_mask, (0, 1)),
        labels=torch.cat([inputs.labels, token_ids[:, None]], 1),
        logit_positions=torch.cat([inputs.logit_positions, length - 1], 1),
    )


def _cut_at_stop(token_ids: list[int], stop_ids: set[int]) -> list[int]:
    length = next((n for n, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return token_ids[:length]
