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

from errata.functional.card import ModelCard
from errata.functional.forward.hooks import compose_hooks
from errata.functional.types import Batch, Hook, Hooks, Params

__all__ = ["Activation", "record_activations", "zero_perturbations"]


class Activation(NamedTuple):
    """What went through one site."""

    input: Tensor  # [B L in]
    output: Tensor  # [B L out], the probe included


def record_activations(
    decode: Callable[..., Any],
    params: Params,
    batch: Batch,
    sites: Iterable[str],
    *,
    perturbations: Mapping[str, Tensor] | None = None,
    hooks: Hooks | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Activation]]:
    """Decode, recording (input, output) at `sites` and adding `perturbations` to outputs.

    `sites` are full paths. `hooks` run first, so a tap sees what a bound model sees; `options`
    go to `decode`. Under `torch.func.grad` return the taps as auxiliary values:

        def loss(probes):
            logits, taps = tap(model.decode, model.params, batch, sites, probes=probes)
            return nll(logits, batch.labels).sum(), {site: taps[site].input for site in sites}

        deltas, inputs = torch.func.grad(loss, has_aux=True)(zeros(model.card, batch, sites))
    """
    perturbations = perturbations or {}
    activations: dict[str, Activation] = {}
    recorders = {
        site: _recording_hook(site, perturbations.get(site), activations)
        for site in (*sites, *perturbations)
    }
    result = decode(params, batch, compose_hooks(hooks or {}, recorders), **options)
    return result, activations


def zero_perturbations(card: ModelCard, batch: Batch, sites: Iterable[str]) -> dict[str, Tensor]:
    """A zero probe [B L out] for each linear site, as wide as its output, as long as the rows."""
    num_rows, length = batch.hidden_states.shape[:2]
    like = batch.hidden_states.detach()
    return {
        site: like.new_zeros(num_rows, length, card.linear_shapes[card.resolve_linear(site)][0])
        for site in sites
    }


def _recording_hook(
    site: str, perturbation: Tensor | None, activations: dict[str, Activation]
) -> Hook:
    def hook(module_input: Tensor, output: Tensor) -> Tensor:
        output = output if perturbation is None else output + _reshape_like(perturbation, output)
        activations[site] = Activation(module_input, output)
        return output

    return hook


def _reshape_like(perturbation: Tensor, output: Tensor) -> Tensor:
    # OPT flattens rows and tokens for its feed-forward part; a probe keeps [B L out] all the same.
    return (
        perturbation
        if perturbation.shape == output.shape
        else torch.reshape(perturbation, output.shape)
    )
