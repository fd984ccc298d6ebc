"""Record activations at sites of a decode, and add perturbations to read gradients there.

With u the input of a linear map y = W u and a zero perturbation p added to y, the gradient of a
loss with respect to p is delta = dL/dy, and dL/dW = sum_t delta_t u_t^T (Mitchell et al., "Fast
Model Editing at Scale", 2022, eq. 2). No weight gradient is formed and no parameter needs one.
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
    """Input and output of one site.

    Attributes:
        input: [B L in].
        output: [B L out], with the perturbation.
    """

    input: Tensor
    output: Tensor


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
    """Decode, record input and output at `sites`, and add `perturbations` to outputs.

    Under `torch.func.grad`, return the activations as auxiliary values:

        def loss(perturbations):
            logits, activations = record_activations(
                model.decode, model.params, batch, sites, perturbations=perturbations
            )
            inputs = {site: activations[site].input for site in sites}
            return nll(logits, batch.labels).sum(), inputs

        zeros = zero_perturbations(model.card, batch, sites)
        output_grads, inputs = torch.func.grad(loss, has_aux=True)(zeros)

    Args:
        decode: `decode` of a model, bound or not.
        params: Parameters of the model.
        batch: The batch to decode.
        sites: Full paths of modules.
        perturbations: Full path -> tensor added to the output. These sites are recorded too.
        hooks: Hooks that run before the recording.
        **options: Further arguments of `decode`.

    Returns:
        The result of `decode`, and path -> activation.

    Raises:
        UnknownSiteError: If a path is not a module of the model.
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
    """Make a zero perturbation for each linear site.

    Args:
        card: Card of the model.
        batch: The batch that will be decoded.
        sites: Neutral names or full paths of linear maps.

    Returns:
        Site -> zeros [B L out].

    Raises:
        UnknownSiteError: If a site is not a linear map.
    """
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
    # OPT flattens rows and tokens for its feed-forward part; a perturbation is always [B L out].
    return (
        perturbation
        if perturbation.shape == output.shape
        else torch.reshape(perturbation, output.shape)
    )
