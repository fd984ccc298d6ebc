"""Rows of token ids and images as one batch of tensors.

B rows · L tokens · T scored positions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional import IGNORE_INDEX, Inputs
from errata.functional.errors import InvalidInputError

__all__ = ["TokenRow", "collate", "concat_pixels"]


class TokenRow(NamedTuple):
    """A row as token ids."""

    input_ids: list[int]
    image_mask: list[bool]
    scored_tokens: range  # positions of the answer's tokens


def collate(
    token_rows: Sequence[TokenRow],
    pad_id: int,
    content_ids: tuple[tuple[str, ...], ...],
    vision_inputs: dict[str, Any],
) -> Inputs:
    """Collate rows of ids into right-padded tensors.

    Args:
        token_rows: Ids, image mask and scored tokens of each row.
        pad_id: Id of padding.
        content_ids: Content ids of each row's images.
        vision_inputs: Pixels and grids by name.

    Returns:
        Inputs.
    """
    num_rows = len(token_rows)
    length = max((len(row.input_ids) for row in token_rows), default=0)
    num_targets = max((len(row.scored_tokens) for row in token_rows), default=0)
    input_ids = torch.full((num_rows, length), pad_id, dtype=torch.int64, device="cpu")
    attention_mask = torch.zeros((num_rows, length), dtype=torch.bool, device="cpu")
    image_mask = torch.zeros((num_rows, length), dtype=torch.bool, device="cpu")
    labels = torch.full((num_rows, num_targets), IGNORE_INDEX, dtype=torch.int64, device="cpu")
    logit_positions = torch.zeros((num_rows, num_targets), dtype=torch.int64, device="cpu")
    for index, row in enumerate(token_rows):
        input_ids[index, : len(row.input_ids)] = torch.tensor(
            row.input_ids, dtype=torch.int64, device="cpu"
        )
        attention_mask[index, : len(row.input_ids)] = True
        image_mask[index, : len(row.input_ids)] = torch.tensor(
            row.image_mask, dtype=torch.bool, device="cpu"
        )
        positions = torch.arange(
            row.scored_tokens.start, row.scored_tokens.stop, dtype=torch.int64, device="cpu"
        )
        labels[index, : len(positions)] = input_ids[index, positions]
        logit_positions[index, : len(positions)] = positions - 1
    return Inputs(
        input_ids, attention_mask, image_mask, labels, logit_positions, vision_inputs, content_ids
    )


def concat_pixels(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the pixels of rows by name; a shorter second axis is padded with zeros.

    That axis holds the tiles of LLaVA-OneVision.

    Args:
        rows: Pixels and grids of each row.

    Returns:
        Tensors by name.

    Raises:
        InvalidInputError: For videos of unequal length, which cannot share a batch.
    """
    batch = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        tensors = [row[name] for row in rows if name in row]
        if tensors[0].ndim > 2 and len({tensor.shape[1] for tensor in tensors}) > 1:
            if name == "pixel_values_videos":
                raise InvalidInputError(
                    "videos of one batch must have the same number of frames, got "
                    f"{sorted({tensor.shape[1] for tensor in tensors})}: read them apart."
                )
            max_tiles = max(tensor.shape[1] for tensor in tensors)
            tensors = [
                torch.cat([t, t.new_zeros(len(t), max_tiles - t.shape[1], *t.shape[2:])], dim=1)
                for t in tensors
            ]
        batch[name] = torch.cat(tensors)
    return batch
