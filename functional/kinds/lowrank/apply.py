"""The three arithmetics (`act`, `act_fp32`, `weight`) and the stacked form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce

import torch.nn.functional as F
from torch import Tensor

from errata.functional.card import module_path
from errata.functional.forward.batches import _unflatten_rows
from errata.functional.forward.grouped_linear import low_rank_maps
from errata.functional.header import Header
from errata.functional.kinds.common.patch import Patch, _make_hooks
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.types import Batch, Hook, Model
from errata.kernels import apply_grouped_lora

__all__ = ["apply_lowrank"]


def apply_lowrank(
    model: Model, header: Header, entry: LowRank, tensors: Mapping[str, Tensor]
) -> Patch:
    """Build a low-rank patch: dW = B A, added to the weight or to the output as the header says.

    Args:
        model: Model to bind to.
        header: Header of the delta; `arithmetic` is `weight` or `output`.
        entry: Entry of the delta.
        tensors: `NAME.A` [r I] and `NAME.B` [O r]; [E, ...] in a stacked delta.

    Returns:
        A patch of the parameter, or of the outputs of its maps.
    """
    card, parameter = model.card, model.card.canonical_name(entry.name)
    down, up = tensors[f"{entry.name}.A"], tensors[f"{entry.name}.B"]
    names = entry.changed_names(card, header)
    if header.stack:
        paths = [module_path(name) for name in names if card.in_decoder(name)]
        linear = [
            path for path in paths if path in card.linear_shapes and not card.before_decoder(path)
        ]
        makers = {path: partial(_per_row_lowrank_hook, down, up) for path in linear}
        return Patch(hooks=partial(_make_hooks, makers), per_edit=len(linear) < len(paths))
    paths = [module_path(name) for name in names]
    all_linear = all(
        p in card.linear_shapes and card.before_decoder(p) != card.in_decoder(p) for p in paths
    )
    if header.arithmetic == "weight" or not all_linear:
        base = model.params[parameter]
        full = (up.float() @ down.float()).to(base.dtype)  # as PEFT merges: rounded, then added
        full = full.mT if entry.transposed else full
        return Patch(params={parameter: base + full})
    in_fp32 = header.arithmetic == "act_fp32"
    hook = (
        _act_fp32_hook(low_rank_maps(down, up, len(entry.edit_ranks)))
        if in_fp32
        else _act_hook(down, up)
    )
    decoder_hooks = {path: hook for path in paths if card.in_decoder(path)}
    embed_hooks = {path: hook for path in paths if card.before_decoder(path)}
    return Patch(
        hooks=(lambda batch: decoder_hooks) if decoder_hooks else None, embed_hooks=embed_hooks
    )


def _act_hook(down: Tensor, up: Tensor) -> Hook:
    def hook(x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    return hook


def _act_fp32_hook(maps: Sequence[Tensor]) -> Hook:
    def hook(x: Tensor, y: Tensor) -> Tensor:
        return (y + reduce(F.linear, maps, x.float())).to(y.dtype)

    return hook


def _per_row_lowrank_hook(down: Tensor, up: Tensor, batch: Batch) -> Hook:
    """y + (x A_e^T) B_e^T in fp32, rounded once, e = the row's edit."""

    def hook(x: Tensor, y: Tensor) -> Tensor:
        return apply_grouped_lora(
            _unflatten_rows(x, batch), down, up, batch.edit_index, _unflatten_rows(y, batch)
        ).view(y.shape)

    return hook
