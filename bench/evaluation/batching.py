"""How many rows fit into the memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from errata.functional import Model, Query
from errata.functional.errors import ErrataError, InvalidInputError
from errata.functional.metrics.readout import Readout

__all__ = ["check_finite", "make_batches", "row_num_bytes"]

MAX_ROWS = 64  # read and embedded together, whatever the budget


def check_finite(model: Model, readout: Readout) -> None:
    """Check that the base model's own scores are numbers.

    Args:
        model: The base.
        readout: Its scores.

    Raises:
        InvalidInputError: Names the parameters that hold NaN or infinity.
    """
    if bool(readout.nll.isfinite().all()):
        return
    broken = [n for n, t in model.params.items() if not bool(torch.isfinite(t).all())]
    where = (
        f"{len(broken)} parameter(s) hold NaN or infinity, e.g. {broken[0]}"
        if broken
        else (
            "its parameters are finite, so it overflows in "
            f"{next(iter(model.params.values())).dtype}"
        )
    )
    raise InvalidInputError(
        f"a model must give finite scores, and {model.card.id} does not: {where}. "
        "Get the checkpoint again, or load it with another dtype."
    )


def row_num_bytes(model: Model, num_tokens: int) -> int:
    """An upper estimate of what one row takes while it is decoded without gradients.

    Sixteen values of model width per token (residual stream, attention, feed-forward), and two
    attention maps per head of about 64 channels.

    Args:
        model: The model.
        num_tokens: Tokens of the row.

    Returns:
        Bytes.
    """
    card = model.card
    heads = max(1, card.hidden_size // 64)
    return 4 * (16 * num_tokens * card.hidden_size + 2 * heads * num_tokens * num_tokens)


def make_batches(model: Model, queries: Sequence[Query], memory_bytes: int) -> Iterator[list[int]]:
    """Batch queries of equal numbers of images and similar length, as many as fit the budget.

    Args:
        model: The model.
        queries: Queries.
        memory_bytes: The budget.

    Yields:
        Numbers of the queries of one batch.
    """
    groups: dict[tuple, list[int]] = {}
    for number, query in enumerate(queries):
        groups.setdefault((len(query.images), query.video), []).append(number)
    for numbers in groups.values():
        numbers.sort(key=lambda n: (-len(queries[n].prompt) - len(queries[n].target), n))
        longest, scored = _query_lengths(model, queries[numbers[0]])
        bytes_per_row = (
            row_num_bytes(model, longest) + 4 * scored * model.card.vocab_size
        )  # and the base's logits
        size = max(1, min(MAX_ROWS, memory_bytes // bytes_per_row))
        for begin in range(0, len(numbers), size):
            yield numbers[begin : begin + size]


def _query_lengths(model: Model, query: Query) -> tuple[int, int]:
    """Tokens of a question with its answer, and of the answer alone."""
    try:
        inputs = model.preprocess([query])
        return inputs.input_ids.shape[1], inputs.labels.shape[1]
    except ErrataError as fault:
        raise type(fault)(f"{fault} (asked: {query.prompt[:60]!r})") from fault
