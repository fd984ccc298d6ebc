"""Rows of one batch under different low-rank deltas, by definition.

Legend: B rows · L tokens · I, O input and output widths · E edits · R rank
"""

import torch
from torch import Tensor

GATHERED = 1 << 24  # elements of the gathered factors held at once


def apply(x: Tensor, down: Tensor, up: Tensor, edit: Tensor, base: Tensor | None) -> Tensor:
    """`base + (x A_e^T) B_e^T` in fp32, rounded once; differentiable plain torch.

    Args:
        x: [B L I].
        down: [E R I], the factors `A`.
        up: [E O R], the factors `B`.
        edit: [B] int64, -1 for a row without an edit.
        base: [B L O], or None for zero.
    """
    shape = (*x.shape[:2], up.shape[1])
    if down.shape[0] == 0:
        return x.new_zeros(shape) if base is None else base
    live = (edit >= 0)[:, None, None]
    chosen = edit.clamp(min=0)
    inner = torch.bmm(x.float(), down[chosen].float().mT)  # [B L R]
    change = torch.bmm(inner, up[chosen].float().mT)  # [B L O]
    if base is None:
        return torch.where(live, change, 0).to(x.dtype)
    return torch.where(live, (base.float() + change).to(base.dtype), base)


def grouped_lora(x: Tensor, down: Tensor, up: Tensor, edit: Tensor, base: Tensor | None) -> Tensor:
    """`apply`, forward only, a few rows at a time: the gathered factors stay bounded."""
    if x.shape[0] == 0:
        return torch.zeros(
            (*x.shape[:2], up.shape[1]), dtype=x.dtype if base is None else base.dtype
        ).to(x.device)
    factors = down.shape[1] * (down.shape[2] + up.shape[1])
    step = max(1, GATHERED // max(1, factors))
    parts = [
        apply(
            x[start : start + step],
            down,
            up,
            edit[start : start + step],
            None if base is None else base[start : start + step],
        )
        for start in range(0, x.shape[0], step)
    ]
    out = torch.cat(parts)
    return out.clone() if out is base else out
