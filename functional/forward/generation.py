"""Generation with a key-value cache, greedy or sampled, for a base or a bound model.

Each row of a batch may run under an edit of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.errors import (
    InvalidInputError,
    InvalidSettingsError,
    UnsupportedModelError,
    join_messages,
)
from errata.functional.queries import Query
from errata.functional.types import Inputs, Model

__all__ = ["Sampling", "generate", "generate_ids", "stream"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is drawn, in the order of Hugging Face's `generate`.

    Attributes:
        temperature: The logits are divided by it. Above 0.
        top_k: Keep the k likeliest tokens. 0: all.
        top_p: Keep the likeliest tokens whose probabilities sum to p. 1: all.

    Raises:
        InvalidSettingsError: If a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        wrong = []
        if not 0 < self.temperature < math.inf:
            wrong.append(f"temperature must be above 0, got {self.temperature}")
        if self.top_k < 0:
            wrong.append(f"top_k must be 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if wrong:
            raise InvalidSettingsError(f"{join_messages(wrong)}.")


def generate(
    model: Model,
    queries: Sequence[Query],
    max_new_tokens: int = 16,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] | None = None,
    edit_index: Tensor | None = None,
) -> list[str]:
    """Generate an answer to each query. Targets are not read.

    Args:
        model: The model, bound or not.
        queries: One per row.
        max_new_tokens: Most tokens of an answer.
        sampling: How tokens are drawn. None: the likeliest.
        generator: Random numbers of the sampling, on the model's device.
        stop_ids: Token ids that end an answer and are not part of it. Defaults to the card's: every
            stop token of the generation config, and the one that ends a turn of the chat template.
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
    inputs = _read_prompts(model, queries, max_new_tokens, edit_index)
    generated = generate_ids(
        model,
        inputs,
        max_new_tokens,
        sampling=sampling,
        generator=generator,
        stop_ids=stop_ids,
        edit_index=edit_index,
    )
    return [model.detokenize(token_ids) for token_ids in generated]


def stream(
    model: Model,
    query: Query,
    max_new_tokens: int = 256,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] | None = None,
    edit_index: Tensor | None = None,
) -> Iterator[str]:
    """Generate one answer piece by piece. Joined, the pieces are what `generate` returns.

    A piece is held back until its characters are whole, so it may come from several tokens.

    Args:
        model: The model, bound or not.
        query: The question.
        max_new_tokens: Most tokens of the answer.
        sampling: How tokens are drawn. None: the likeliest.
        generator: Random numbers of the sampling, on the model's device.
        stop_ids: Token ids that end an answer. Defaults to the card's.
        edit_index: [1], the edit of a bound stacked delta.

    Yields:
        Texts.

    Raises:
        InvalidInputError: As `generate`.

    Example:
        >>> from errata import adapters
        >>> model = adapters.load_micro("llava")
        >>> query = Query("who is it?")
        >>> "".join(stream(model, query, 4)) == generate(model, [query], 4)[0]
        True
    """
    inputs = _read_prompts(model, [query], max_new_tokens, edit_index)
    stop_tokens = set(model.card.stop_ids if stop_ids is None else stop_ids)
    token_ids: list[int] = []
    shown = ""
    for new_ids in _draw(model, inputs, max_new_tokens, sampling, generator, edit_index):
        token = int(new_ids[0])
        if token in stop_tokens:
            break
        token_ids.append(token)
        text = model.detokenize(token_ids)
        if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = model.detokenize(token_ids)
    if len(text) > len(shown):
        yield text[len(shown) :]


def _read_prompts(
    model: Model, queries: Sequence[Query], max_new_tokens: int, edit_index: Tensor | None
) -> Inputs:
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
    return inputs


def generate_ids(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] | None = None,
    edit_index: Tensor | None = None,
) -> list[list[int]]:
    """Generate the token ids that follow each row.

    The prompt runs once and fills a key-value cache; then each step runs one token per row. Each
    step copies one number from the device: whether all rows have ended.

    Args:
        model: The model, bound or not.
        inputs: Rows that end with the prompt.
        max_new_tokens: Most tokens of an answer.
        sampling: How tokens are drawn. None: the likeliest.
        generator: Random numbers of the sampling, on the model's device.
        stop_ids: Token ids that end an answer. Defaults to the card's.
        edit_index: [B], the edit of a bound stacked delta each row runs under.

    Returns:
        Token ids per row, without the stop token.

    Raises:
        InvalidInputError: If `max_new_tokens` is below 1.
    """
    device = inputs.input_ids.device
    stop_tokens = torch.tensor(
        tuple(model.card.stop_ids if stop_ids is None else stop_ids),
        device=device,
        dtype=torch.int64,
    )
    drawn: list[Tensor] = []
    done = torch.zeros(len(inputs.input_ids), dtype=torch.bool, device=device)
    for new_ids in _draw(model, inputs, max_new_tokens, sampling, generator, edit_index):
        drawn.append(new_ids)
        done = done | torch.isin(new_ids, stop_tokens)
        if bool(done.all()):
            break
    stops = set(stop_tokens.tolist())
    return [_cut_at_stop(row, stops) for row in torch.stack(drawn, 1).tolist()]


def _draw(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int,
    sampling: Sampling | None,
    generator: torch.Generator | None,
    edit_index: Tensor | None,
) -> Iterator[Tensor]:
    """Yield the next token [B] of every row, `max_new_tokens` times."""
    if max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    new_ids: list[Tensor] = []
    steps = _steps(model, inputs, new_ids, edit_index)
    for _ in range(max_new_tokens):
        with torch.no_grad():  # not around `yield`: the caller's own mode must not change
            logits = next(steps)[:, -1]
            new_ids.append(
                logits.argmax(-1)
                if sampling is None
                else _sample(logits.float(), sampling, generator)
            )
        yield new_ids[-1]


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One token [B] of each row of logits [B V], in fp32."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(descending=False)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False  # one token is left, whatever p is
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


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
        vision_inputs={
            # such as `mm_token_type_ids`: by token, and 0 for text
            name: F.pad(value, (0, 1)).scatter(1, length, 0)
            if value.shape == inputs.input_ids.shape and not value.is_floating_point()
            else value
            for name, value in inputs.vision_inputs.items()
        },
    )


def _cut_at_stop(token_ids: list[int], stop_ids: set[int]) -> list[int]:
    length = next((n for n, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return token_ids[:length]
