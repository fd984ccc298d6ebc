"""W + dW, or one dW per row when stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from errata.functional.forward.batches import _unflatten_rows
from errata.functional.forward.grouped_linear import grouped_linear
from errata.functional.header import Header
from errata.functional.kinds.common.patch import Patch, _make_hooks
from errata.functional.kinds.dense.entry import Dense
from errata.functional.types import Batch, Hook, Model

__all__ = ["apply_dense"]

# The kinds.


def apply_dense(model: Model, header: Header, entry: Dense, tensors: Mapping[str, Tensor]) -> Patch:
    """Build a dense patch: W' = W + d in the wider dtype of the two, then in that of W.

    Args:
        model: Model to bind to.
        header: Header of the delta.
        entry: Entry of the delta.
        tensors: `NAME` of the shape of W; [E, ...] in a stacked delta.

    Returns:
        A patch of the parameter; of the outputs of its maps, row by row, in a stacked delta.
    """
    card, parameter, change = (
        model.card,
        model.card.canonical_name(entry.name),
        tensors[entry.name],
    )
    if not header.stack:
        base = model.params[parameter]
        return Patch(params={parameter: (base + change).to(base.dtype)})
    makers: dict[str, Callable[[Batch], Hook]] = {}
    per_edit = False
    for name in filter(card.in_decoder, card.all_names(parameter)):
        path, _, leaf = name.rpartition(".")
        if path not in card.linear_shapes or card.before_decoder(path):
            per_edit = True
        elif leaf == "weight":
            maps = change.mT if path in card.transposed else change
            makers[path] = partial(_per_row_hook, maps)
        else:
            makers[path] = partial(_per_row_bias_hook, change)
    return Patch(hooks=partial(_make_hooks, makers), per_edit=per_edit)


def _per_row_hook(maps: Tensor, batch: Batch) -> Hook:
    """y + x maps[e]^T in the wider dtype, e = the row's edit."""

    def hook(x: Tensor, y: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, maps.dtype)
        change = grouped_linear(
            _unflatten_rows(x, batch).to(dtype), maps.to(dtype), batch.edit_index
        )
        return (y + change.view(y.shape)).to(y.dtype)

    return hook


def _per_row_bias_hook(biases: Tensor, batch: Batch) -> Hook:
    """y + biases[e], e = the row's edit."""

    def hook(x: Tensor, y: Tensor) -> Tensor:
        change = biases[batch.edit_index.clamp_min(0)] * (batch.edit_index >= 0)[:, None]  # [B out]
        return (_unflatten_rows(y, batch) + change[:, None]).to(y.dtype).view(y.shape)

    return hook
