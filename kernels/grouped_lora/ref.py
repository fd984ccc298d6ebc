"""Rows of one batch under different low-rank deltas, in plain torch.

Legend: B rows · L tokens · I, O input and output widths · E edits · R rank
"""

from itertools import groupby

import torch
from torch import Tensor


def grouped_lora_differentiable(
    x: Tensor, down: Tensor, up: Tensor, edit_index: Tensor, base: Tensor | None
) -> Tensor:
    """Compute `base + (x A_e^T) B_e^T` in fp32, rounded once; differentiable.

    Args:
        x: [B L I].
        down: [E R I], the factors `A`.
        up: [E O R], the factors `B`.
        edit_index: [B] int64, -1 for a row without an edit.
        base: [B L O], or None for zero.

    Returns:
        [B L O], in the dtype of `base`, or of `x` without one.
    """
    shape = (*x.shape[:2], up.shape[1])
    if down.shape[0] == 0:
        return x.new_zeros(shape) if base is None else base
    has_edit = (edit_index >= 0)[:, None, None]
    chosen = edit_index.clamp(min=0)
    inner = torch.bmm(x.float(), down[chosen].float().mT)  # [B L R]
    change = torch.bmm(inner, up[chosen].float().mT)  # [B L O]
    if base is None:
        return torch.where(has_edit, change, 0).to(x.dtype)
    return torch.where(has_edit, (base.float() + change).to(base.dtype), base)


def grouped_lora(
    x: Tensor, down: Tensor, up: Tensor, edit_index: Tensor, base: Tensor | None
) -> Tensor:
    """Compute `base + (x A_e^T) B_e^T` in fp32, rounded once; without gradients.

    No factor is gathered. Adjacent rows of one edit run in one product.

    Args:
        x: [B L I].
        down: [E R I], the factors `A`.
        up: [E O R], the factors `B`.
        edit_index: [B] int64, -1 for a row without an edit.
        base: [B L O], or None for zero.

    Returns:
        [B L O], in the dtype of `base`, or of `x` without one.
    """
    like, num_tokens = x if base is None else base, x.shape[1]
    out = torch.empty((*x.shape[:2], up.shape[1]), dtype=like.dtype, device=x.device)
    x, flat = x.flatten(0, 1), out.flatten(0, 1)  # [BL I] [BL O]
    base = None if base is None else base.flatten(0, 1)
    stop = 0
    for number, rows in groupby(edit_index.tolist()):
        start, stop = stop, stop + num_tokens * len(list(rows))
        out_rows = flat[start:stop]
        if number < 0:
            out_rows.copy_(out_rows.new_zeros(()) if base is None else base[start:stop])
            continue
        total = out_rows if out_rows.dtype == torch.float32 else out_rows.float()
        inner = torch.mm(x[start:stop].float(), down[number].float().mT)  # [bL R]
        factor = up[number].float().mT
        if base is None:
            torch.mm(inner, factor, out=total)
        else:
            torch.addmm(base[start:stop].float(), inner, factor, out=total)
        if total is not out_rows:
            out_rows.copy_(total)
    return out
