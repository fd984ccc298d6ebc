"""A codebook at a linear map, as a rewrite: the nearest key of each row, and its value.

Legend: B rows · L tokens · E edits · N keys · I width of a key · O width of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from errata.kernels import codebook as kernel

from .header import Codebook, Where
from .types import Batch

__all__ = ["at_prompt", "codebook", "put", "tokens"]


def codebook(
    entry: Codebook, tensors: Mapping[str, Tensor], *, stacked: bool
) -> Callable[[Batch, Tensor, Tensor], Tensor]:
    """What a codebook does to the output y of its map, given the map's input x.

        q_b = x[b, t_b],  t_b the last prompt token of row b
        n_b = argmin_n |keys_n - q_b|
        y'[b, l] = values[n_b]  if |keys_(n_b) - q_b| <= radii_(n_b) and l is one of `where`
                   y[b, l]      otherwise

    A batch that does not hold a row's last prompt token (tokens generated behind it) leaves the row
    as it is: the change of the prompt is in its keys and values. With `stacked` tensors lead with
    E, and each row looks into the book of its own edit, none into that of edit -1.

    After GRACE (Hartvigsen et al. 2023, arXiv 2211.11031), `GRACEAdapter.forward`.
    """
    keys, values, radii = (tensors[f"{entry.name}.{part}"] for part in ("keys", "values", "radii"))
    keys = keys.float()
    norms = None if stacked else kernel.square_norms(keys)

    def rewrite(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        query = at_prompt(batch, x).float()  # [B I]
        inside = batch.prompt.any(1)
        if stacked:
            mine = batch.edit.clamp_min(0)
            found = torch.vmap(kernel.lookup)(query[:, None], keys[mine], radii[mine])
            index, hit = found.index[:, 0], found.hit[:, 0] & inside & (batch.edit >= 0)
            chosen = values[mine, index.clamp_min(0)]
        else:
            found = kernel.lookup(query, keys, radii, norms=norms)
            index, hit = found.index, found.hit & inside
            chosen = values[index.clamp_min(0)]  # [B O]
        return put(y, chosen, hit[:, None] & tokens(batch, entry.where))

    return rewrite


def at_prompt(batch: Batch, x: Tensor) -> Tensor:
    """[B I] what a map was given at each row's last prompt token; the first, where there is none.

    `x` is [B L I], or [B*L I] where a layer flattened rows and tokens (OPT does).
    """
    at = batch.prompt.int().argmax(1)[:, None, None]  # [B 1 1]
    x = x.reshape(*batch.prompt.shape, -1)
    return x.gather(1, at.expand(-1, 1, x.shape[-1]))[:, 0].detach()


def tokens(batch: Batch, where: Where) -> Tensor:
    """[B L] the tokens that a value replaces: `last` of the prompt, those before it, or `all`."""
    if where == "last":
        return batch.prompt
    upto = batch.prompt.int().flip(1).cumsum(1).flip(1) > 0
    return upto if where == "all" else upto & ~batch.prompt


def put(y: Tensor, values: Tensor, where: Tensor) -> Tensor:
    """y with values [B O] at the tokens where [B L]; differentiable in both."""
    rows = y.reshape(*where.shape, -1)
    return torch.where(where[..., None], values[:, None].to(y.dtype), rows).view(y.shape)
