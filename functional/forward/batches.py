"""Slice, pad and concatenate batches, along rows and along tokens.

The key of a layer input gives its axes: `name@bqk_` is a tensor with rows first, then query
tokens, key tokens, and something else. It can be sliced without knowing what it means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.errors import ShapeError
from errata.functional.types import IGNORE_INDEX, Batch, Inputs

__all__ = [
    "concat_batches",
    "gather_tokens",
    "mean_per_edit",
    "pad_batch",
    "prompt_end_mask",
    "repeat_per_edit",
    "resize_keys",
    "take_rows",
    "tokens_before",
    "tokens_from",
    "trim_batch",
]


def prompt_end_mask(inputs: Inputs) -> Tensor:
    """Mask the last token of each prompt, whose logits predict the first token of the answer.

    Args:
        inputs: Preprocessed queries.

    Returns:
        [B L] bool. In a row with nothing scored, the last token is marked.
    """
    prompt_end = inputs.attention_mask.sum(-1) - 1  # [B]
    if inputs.labels.shape[1]:
        scored = inputs.labels != IGNORE_INDEX
        first = inputs.logit_positions.gather(1, scored.int().argmax(-1, keepdim=True))[:, 0]
        prompt_end = torch.where(scored.any(-1), first, prompt_end)
    return (
        torch.arange(inputs.input_ids.shape[1], device=prompt_end.device, dtype=torch.int64)
        == prompt_end[:, None]
    )


def take_rows(batch: Batch, rows: Tensor | slice) -> Batch:
    """Select rows of a batch.

    Args:
        batch: The batch.
        rows: Indices, a bool mask or a slice of rows.

    Returns:
        A batch of these rows, in the order given.
    """
    return batch._replace(
        **{name: getattr(batch, name)[rows] for name in _ROW_FIELDS},
        layer_inputs={key: value[rows] for key, value in batch.layer_inputs.items()},
        routing={key: value[rows] for key, value in batch.routing.items()},
    )


def tokens_before(batch: Batch, t: int) -> Batch:
    """Keep the tokens before `t` of every row.

    Args:
        batch: The batch.
        t: First position to drop.

    Returns:
        A batch of t tokens. Labels predicted from later positions become `IGNORE_INDEX`.
    """
    is_kept = (batch.logit_positions < t) & (batch.labels != IGNORE_INDEX)
    return _slice_tokens(batch, slice(0, t), slice(0, t))._replace(
        labels=torch.where(is_kept, batch.labels, IGNORE_INDEX),
        logit_positions=torch.where(is_kept, batch.logit_positions, 0),
    )


def tokens_from(batch: Batch, t: int) -> Batch:
    """Keep the tokens from `t` of every row, to be decoded with the cache of `tokens_before`.

    `decode(params, tokens_from(b, t), kv_cache=cache)`, with `_, cache = decode(params,
    tokens_before(b, t), return_cache=True)`, gives the logits of `decode(params, b)` at positions
    from `t`. This is exact if attention is causal.

    Args:
        batch: The batch.
        t: First position to keep.

    Returns:
        A batch of L - t tokens. Labels predicted from earlier positions become `IGNORE_INDEX`.
    """
    is_kept = (batch.logit_positions >= t) & (batch.labels != IGNORE_INDEX)
    return _slice_tokens(batch, slice(t, None), slice(None))._replace(
        labels=torch.where(is_kept, batch.labels, IGNORE_INDEX),
        logit_positions=torch.where(is_kept, batch.logit_positions - t, 0),
    )


def gather_tokens(batch: Batch, positions: Tensor) -> Batch:
    """Keep some tokens of each row as queries; keys stay as they are.

    Args:
        batch: The batch.
        positions: [B T], the tokens to keep.

    Returns:
        A batch of T tokens. Labels and logit positions are unchanged.
    """
    layer_inputs = {
        key: _gather_axis(value, _axis(key, "q"), positions)
        for key, value in batch.layer_inputs.items()
    }
    return batch._replace(
        hidden_states=_gather_axis(batch.hidden_states, 1, positions),
        attention_mask=batch.attention_mask.gather(1, positions),
        position_ids=_gather_axis(batch.position_ids, 2, positions),
        image_mask=batch.image_mask.gather(1, positions),
        prompt_end=batch.prompt_end.gather(1, positions),
        layer_inputs=layer_inputs,
    )


def pad_batch(batch: Batch, length: int, num_labels: int | None = None) -> Batch:
    """Pad rows with tokens that are masked out.

    Padded tokens repeat the last one, so that every query still has a key to attend to.

    Args:
        batch: The batch.
        length: Tokens per row in the result.
        num_labels: Labels per row in the result; unchanged by default.

    Returns:
        The padded batch.

    Raises:
        ShapeError: If the batch is longer, in tokens or labels.
    """
    num_new_tokens = length - batch.hidden_states.shape[1]
    num_new_labels = (
        batch.labels.shape[1] if num_labels is None else num_labels
    ) - batch.labels.shape[1]
    if num_new_tokens < 0 or num_new_labels < 0:
        raise ShapeError(
            f"a batch can only be padded to be longer: asked for {length} tokens, has "
            f"{batch.hidden_states.shape[1]} tokens and {batch.labels.shape[1]} labels."
        )
    layer_inputs = {}
    for key, value in batch.layer_inputs.items():
        query_axis, key_axis = _axis(key, "q"), _axis(key, "k")
        if query_axis is not None:
            value = _repeat_last(value, query_axis, num_new_tokens)
        if key_axis is not None:
            value = _append_masked_keys(value, key_axis, num_new_tokens)
        layer_inputs[key] = value
    return batch._replace(
        hidden_states=_repeat_last(batch.hidden_states, 1, num_new_tokens),
        attention_mask=F.pad(batch.attention_mask, (0, num_new_tokens)),
        position_ids=_repeat_last(batch.position_ids, 2, num_new_tokens),
        image_mask=F.pad(batch.image_mask, (0, num_new_tokens)),
        prompt_end=F.pad(batch.prompt_end, (0, num_new_tokens)),
        labels=F.pad(batch.labels, (0, num_new_labels), value=IGNORE_INDEX),
        logit_positions=F.pad(batch.logit_positions, (0, num_new_labels)),
        layer_inputs=layer_inputs,
    )


def trim_batch(batch: Batch, length: int) -> Batch:
    """Keep the first `length` tokens of every row, for rows with more padding than they need.

    Args:
        batch: The batch.
        length: Tokens to keep.

    Returns:
        The shorter batch. Labels and logit positions are unchanged.
    """
    return _slice_tokens(batch, slice(0, length), slice(0, length))


def resize_keys(batch: Batch, length: int) -> Batch:
    """Change the number of key tokens: later ones are cut, new ones masked for every query.

    For rows of which only some tokens are left (`gather_tokens`), so that L is not the number of
    keys.

    Args:
        batch: The batch.
        length: Key tokens in the result.

    Returns:
        The same rows with `length` key tokens.
    """
    layer_inputs = {}
    for key, value in batch.layer_inputs.items():
        axis = _axis(key, "k")
        if axis is not None:
            value = value.narrow(axis, 0, min(length, value.shape[axis]))
            value = _append_masked_keys(value, axis, length - value.shape[axis])
        layer_inputs[key] = value
    return batch._replace(layer_inputs=layer_inputs)


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """Concatenate the rows of batches at the same depth, padded to the longest.

    A layer input that some batches lack (features a family adds only with images) is zero for their
    rows. Routing is kept only if every batch has it.

    Args:
        batches: At least one batch.

    Returns:
        One batch of all rows.

    Raises:
        ShapeError: If the batches are at different depths.
    """
    depths = sorted({batch.depth for batch in batches})
    if len(depths) != 1:
        raise ShapeError(f"batches must be at one depth to be joined, got depths {depths}.")
    length = max(batch.hidden_states.shape[1] for batch in batches)
    num_labels = max(batch.labels.shape[1] for batch in batches)
    padded = [pad_batch(batch, length, num_labels) for batch in batches]
    samples: dict[str, Tensor] = {}
    for batch in padded:
        samples = {**batch.layer_inputs, **samples}
    layer_inputs = {
        key: torch.cat(
            _pad_key_axis(
                key,
                [
                    _layer_input_or_zeros(batch.layer_inputs, key, like, batch.num_rows)
                    for batch in padded
                ],
            )
        )
        for key, like in samples.items()
    }
    routing_names = set.intersection(*(set(batch.routing) for batch in batches))
    routing = {
        key: torch.cat([batch.routing[key] for batch in batches]) for key in sorted(routing_names)
    }
    fields = {name: torch.cat([getattr(batch, name) for batch in padded]) for name in _ROW_FIELDS}
    return Batch(**fields, layer_inputs=layer_inputs, depth=depths[0], routing=routing)


_ROW_FIELDS = (
    "hidden_states",
    "attention_mask",
    "position_ids",
    "image_mask",
    "prompt_end",
    "labels",
    "logit_positions",
    "edit_index",
)


def _layer_input_or_zeros(
    layer_inputs: Mapping[str, Tensor], key: str, like: Tensor, num_rows: int
) -> Tensor:
    return layer_inputs[key] if key in layer_inputs else like.new_zeros(num_rows, *like.shape[1:])


def _pad_key_axis(key: str, values: list[Tensor]) -> list[Tensor]:
    """Pad all values to the same number of keys; a batch of scored positions keeps all its keys."""
    key_axis = _axis(key, "k")
    if key_axis is None:
        return values
    longest = max(value.shape[key_axis] for value in values)
    return [
        _append_masked_keys(value, key_axis, longest - value.shape[key_axis]) for value in values
    ]


def _axis(key: str, letter: str) -> int | None:
    axis = key.rpartition("@")[2].find(letter)
    return None if axis < 0 else axis


def _slice_tokens(batch: Batch, queries: slice, keys: slice) -> Batch:
    layer_inputs = {}
    for key, value in batch.layer_inputs.items():
        for letter, cut in (("q", queries), ("k", keys)):
            axis = _axis(key, letter)
            if axis is not None:
                value = value[(slice(None),) * axis + (cut,)]
        layer_inputs[key] = value
    return batch._replace(
        hidden_states=batch.hidden_states[:, queries],
        attention_mask=batch.attention_mask[:, queries],
        position_ids=batch.position_ids[:, :, queries],
        image_mask=batch.image_mask[:, queries],
        prompt_end=batch.prompt_end[:, queries],
        layer_inputs=layer_inputs,
    )


def _gather_axis(value: Tensor, axis: int | None, positions: Tensor) -> Tensor:
    if axis is None:
        return value
    index = positions.reshape(
        positions.shape[0], *(1,) * (axis - 1), -1, *(1,) * (value.ndim - axis - 1)
    )
    shape = list(value.shape)
    shape[axis] = positions.shape[1]
    return value.gather(axis, index.expand(shape))


def _repeat_last(value: Tensor, axis: int, count: int) -> Tensor:
    if count == 0:
        return value
    last = value.narrow(axis, value.shape[axis] - 1, 1)
    shape = list(value.shape)
    shape[axis] = count
    return torch.cat([value, last.expand(shape)], axis)


def _append_masked_keys(value: Tensor, axis: int, count: int) -> Tensor:
    """Append masked key tokens: False, or the lowest number in an additive mask."""
    if count == 0:
        return value
    shape = list(value.shape)
    shape[axis] = count
    low = torch.finfo(value.dtype).min if value.is_floating_point() else 0
    return torch.cat([value, value.new_full(shape, low)], axis)


def _unflatten_rows(x: Tensor, batch: Batch) -> Tensor:
    """Restore [B L in] if a layer flattened rows and tokens, as OPT does."""
    return x.reshape(batch.edit_index.shape[0], -1, x.shape[-1])


def repeat_per_edit(batch: Batch, num_edits: int) -> Batch:
    """Repeat every row under every edit.

    Args:
        batch: A batch of B rows.
        num_edits: E.

    Returns:
        A batch of E*B rows, ordered by edit.
    """
    index = torch.arange(batch.num_rows, device=batch.edit_index.device, dtype=torch.int64).repeat(
        num_edits
    )
    edit_index = torch.arange(
        num_edits, device=batch.edit_index.device, dtype=torch.int64
    ).repeat_interleave(batch.num_rows)
    return take_rows(batch, index)._replace(edit_index=edit_index)


def mean_per_edit(values: Tensor, edit_index: Tensor, num_edits: int) -> Tensor:
    """Average values over the rows of each edit.

    Args:
        values: [B].
        edit_index: [B], the edit of each row. Rows of edit -1 are left out.
        num_edits: E.

    Returns:
        [E]; 0 for an edit without rows.

    Example:
        >>> mean_per_edit(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1, 1, 0]), 2)
        tensor([5., 2.])
    """
    bucket = torch.where(edit_index < 0, num_edits, edit_index)
    total = values.new_zeros(num_edits + 1).index_add(0, bucket, values)
    count = values.new_zeros(num_edits + 1).index_add(0, bucket, torch.ones_like(values))
    return (total / count.clamp_min(1))[:num_edits]
