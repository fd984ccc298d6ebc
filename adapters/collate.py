"""Rows of token ids and pictures as one batch of tensors.

B rows · L tokens · T scored positions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional import IGNORE, Inputs
from errata.functional.errors import BadInput

__all__ = ["Encoded", "assemble", "collated"]


class Encoded(NamedTuple):
    """A row as token ids."""

    ids: list[int]
    image: list[bool]
    scored: range  # positions of the answer's tokens


def collated(
    encoded: Sequence[Encoded], pad: int, keys: tuple[tuple[str, ...], ...], pixels: dict[str, Any]
) -> Inputs:
    """Rows of ids as right-padded tensors, with the labels read from the rows."""
    rows = len(encoded)
    length = max((len(row.ids) for row in encoded), default=0)
    targets = max((len(row.scored) for row in encoded), default=0)
    ids = torch.full((rows, length), pad, dtype=torch.int64)
    mask = torch.zeros((rows, length), dtype=torch.bool)
    image = torch.zeros((rows, length), dtype=torch.bool)
    labels = torch.full((rows, targets), IGNORE, dtype=torch.int64)
    at = torch.zeros((rows, targets), dtype=torch.int64)
    for index, row in enumerate(encoded):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = True
        image[index, : len(row.ids)] = torch.tensor(row.image)
        where = torch.arange(row.scored.start, row.scored.stop)
        labels[index, : len(where)] = ids[index, where]
        at[index, : len(where)] = where - 1
    return Inputs(ids, mask, image, labels, at, pixels, keys)


def assemble(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pixels of all rows, by name, one after another; a shorter second axis is filled with zeros.

    That axis is the tiles of LLaVA-OneVision. Videos of unequal length can not share a batch there:
    raises BadInput.
    """
    joined = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        found = [row[name] for row in rows if name in row]
        if found[0].ndim > 2 and len({tensor.shape[1] for tensor in found}) > 1:
            if name == "pixel_values_videos":
                raise BadInput(
                    "videos of one batch must have the same number of frames, got "
                    f"{sorted({tensor.shape[1] for tensor in found})}: read them apart."
                )
            most = max(tensor.shape[1] for tensor in found)
            found = [
                torch.cat([t, t.new_zeros(len(t), most - t.shape[1], *t.shape[2:])], dim=1)
                for t in found
            ]
        joined[name] = torch.cat(found)
    return joined
