"""Per-edit gradients as factors: the input of a linear map and the gradient at its output.

For y = W u and a loss L, dL/dW = sum_t delta_t u_t^T with delta = dL/dy. The two factors are read
off a decode with zero probes (`taps.py`); no weight gradient is formed, no parameter asks for one,
and rows keep apart, so one backward pass gives the factors of every edit in the batch.

Source: Mitchell et al. 2022, "Fast Model Editing at Scale" (MEND), section 3. Legend: B rows ·
L tokens · I in · O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from .losses import nll
from .taps import tap, zeros
from .types import Batch, Model, Rewrites

__all__ = ["Factor", "factors", "gradient", "rows_nll"]


class Factor(NamedTuple):
    """One linear map's part of the gradient, row by row."""

    input: Tensor  # u [B L I]
    delta: Tensor  # dL/dy [B L O]


def rows_nll(logits: Tensor, batch: Batch) -> Tensor:
    """The negative log-likelihood of each row's target, summed over rows: rows stay independent."""
    return nll(logits, batch.labels).sum()


def factors(
    model: Model,
    batch: Batch,
    sites: Iterable[str],
    *,
    loss: Callable[[Tensor, Batch], Tensor] = rows_nll,
    rewrites: Rewrites | None = None,
) -> dict[str, Factor]:
    """(u, delta) of each linear map at `sites` (full paths), for loss(logits, batch) -> scalar.

    With a loss that sums over rows each row's factors are that row's own gradient. Sites must lie
    at or above the batch's depth. Works under `vmap` and inside `grad` (meta-learning).

        found = factors(model, batch, ["model.layers.3.mlp.down_proj"])
        gradient(found["model.layers.3.mlp.down_proj"])      # [B O I]
    """
    sites = list(sites)

    def probed(probes: Mapping[str, Tensor]):
        logits, seen = tap(
            model.decode, model.params, batch, sites, probes=probes, rewrites=rewrites
        )
        return loss(logits, batch), {site: seen[site].input for site in sites}

    deltas, inputs = grad(probed, has_aux=True)(zeros(model.card, batch, sites))
    length = batch.hidden.shape[1]
    return {
        site: Factor(inputs[site].reshape(-1, length, inputs[site].shape[-1]), deltas[site])
        for site in sites
    }


def gradient(factor: Factor) -> Tensor:
    """The weight gradient of each row, [B O I]: sum over tokens of delta u^T.

    >>> gradient(Factor(torch.ones(1, 2, 3), torch.ones(1, 2, 1)))
    tensor([[[2., 2., 2.]]])
    """
    return torch.einsum("bto,bti->boi", factor.delta, factor.input)
