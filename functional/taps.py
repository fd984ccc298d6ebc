"""Look into a decode: record what goes through sites, and add probes to read gradients there.

With u the input of a linear map y = W u and a zero probe p added to y, the gradient of a loss with
respect to p is delta = dL/dy, and dL/dW = sum_t delta_t u_t^T (Mitchell et al., "Fast Model Editing
at Scale", 2022, eq. 2): no weight gradient is formed and no parameter asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import compose
from .card import ModelCard
from .types import Batch, Params, Rewrite, Rewrites

__all__ = ["Tap", "tap", "zeros"]


class Tap(NamedTuple):
    """What went through one site."""

    input: Tensor  # [B L in]
    output: Tensor  # [B L out], the probe included


def tap(
    decode: Callable[..., Any],
    params: Params,
    batch: Batch,
    sites: Iterable[str],
    *,
    probes: Mapping[str, Tensor] | None = None,
    rewrites: Rewrites | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Tap]]:
    """Decode, recording (input, output) at `sites` and adding `probes` to outputs.

    `sites` are full paths. `rewrites` run first, so a tap sees what a bound model sees; `options`
    go to `decode`. Under `torch.func.grad` return the taps as auxiliary values:

        def loss(probes):
            logits, taps = tap(model.decode, model.params, batch, sites, probes=probes)
            return nll(logits, batch.labels).sum(), {site: taps[site].input for site in sites}

        deltas, inputs = torch.func.grad(loss, has_aux=True)(zeros(model.card, batch, sites))
    """
    probes = probes or {}
    seen: dict[str, Tap] = {}
    watch = {site: _watch(site, probes.get(site), seen) for site in (*sites, *probes)}
    result = decode(params, batch, compose(rewrites or {}, watch), **options)
    return result, seen


def zeros(card: ModelCard, batch: Batch, sites: Iterable[str]) -> dict[str, Tensor]:
    """A zero probe [B L out] for each linear site, as wide as its output, as long as the rows."""
    rows, length = batch.hidden.shape[:2]
    like = batch.hidden.detach()
    return {
        site: like.new_zeros(rows, length, card.linears[card.linear(site)][0]) for site in sites
    }


def _watch(site: str, probe: Tensor | None, seen: dict[str, Tap]) -> Rewrite:
    def rewrite(given: Tensor, out: Tensor) -> Tensor:
        out = out if probe is None else out + _fit(probe, out)
        seen[site] = Tap(given, out)
        return out

    return rewrite


def _fit(probe: Tensor, out: Tensor) -> Tensor:
    # OPT flattens rows and tokens for its feed-forward part; a probe keeps [B L out] all the same.
    return probe if probe.shape == out.shape else torch.reshape(probe, out.shape)
