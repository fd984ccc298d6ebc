"""Per-edit gradients as factors: the input of a linear map and the gradient at its output.

For y = W u and a loss L, dL/dW = sum_t delta_t u_t^T with delta = dL/dy. Both factors come from a
decode with zero perturbations (`record_activations`). No weight gradient is formed and no parameter
needs one. Rows stay separate, so one backward pass gives the factors of every edit in the batch.

References:
    Mitchell et al. 2022, "Fast Model Editing at Scale" (MEND), section 3.

Legend: B rows · L tokens · I in · O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from errata.functional.binding.bound_model import bind
from errata.functional.card import ModelCard, module_path
from errata.functional.forward.activations import record_activations, zero_perturbations
from errata.functional.forward.grouped_linear import FactoredGradient
from errata.functional.gradients.losses import nll
from errata.functional.kinds.dense.entry import Dense
from errata.functional.types import Batch, Delta, Hooks, Model

__all__ = [
    "GradientFactors",
    "factored_gradients",
    "gradient_factors",
    "sum_nll",
    "weight_gradient",
]


class GradientFactors(NamedTuple):
    """The factors of one linear map's gradient, row by row.

    Attributes:
        input: u [B L I].
        output_grad: dL/dy [B L O].
    """

    input: Tensor
    output_grad: Tensor


def sum_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Sum the negative log-likelihood of targets over rows, so that rows stay independent.

    Args:
        logits: [B T V].
        batch: The batch with the labels.

    Returns:
        A scalar, in nats.
    """
    return nll(logits, batch.labels).sum()


def gradient_factors(
    model: Model,
    batch: Batch,
    sites: Iterable[str],
    *,
    loss: Callable[[Tensor, Batch], Tensor] = sum_nll,
    hooks: Hooks | None = None,
) -> dict[str, GradientFactors]:
    """Compute the gradient factors (u, dL/dy) of linear maps.

    With a loss that sums over rows, the factors of a row are those of the row's own gradient. Works
    under `vmap` and inside `grad` (meta-learning).

        factors = gradient_factors(model, batch, ["model.layers.3.mlp.down_proj"])
        weight_gradient(factors["model.layers.3.mlp.down_proj"])    # [B O I]

    Args:
        model: The model, bound or not.
        batch: A batch at any depth.
        sites: Full paths of linear maps, none below the batch's depth.
        loss: (logits [B T V], batch) -> scalar.
        hooks: Hooks in the decoder.

    Returns:
        Site -> factors.

    Raises:
        UnknownSiteError: If a site is not a linear map.
    """
    sites = list(sites)

    def perturbed_loss(perturbations: Mapping[str, Tensor]):
        logits, activations = record_activations(
            model.decode, model.params, batch, sites, perturbations=perturbations, hooks=hooks
        )
        return loss(logits, batch), {site: activations[site].input for site in sites}

    output_grads, inputs = grad(perturbed_loss, has_aux=True)(
        zero_perturbations(model.card, batch, sites)
    )
    length = batch.hidden_states.shape[1]
    return {
        site: GradientFactors(
            inputs[site].reshape(-1, length, inputs[site].shape[-1]), output_grads[site]
        )
        for site in sites
    }


def factored_gradients(
    model: Model,
    delta: Delta,
    batch: Batch,
    loss: Callable[[Tensor], tuple[Tensor, Any]],
    **options: Any,
) -> tuple[dict[str, Tensor | FactoredGradient], Any]:
    """Compute the gradients of a loss for a stacked dense delta, as factors if possible.

    Gradients of linear weights are factors (`FactoredGradient`), which an in-place optimizer takes
    directly. For large matrices and few scored tokens this saves most of a step's memory traffic.
    Other parameters get plain gradients [E ...]. All gradients are plain if an entry is not dense
    or not of a linear map in a decoder layer, or if a bound delta is stacked.

    Args:
        model: The model.
        delta: The stacked delta.
        batch: The batch with its `edit_index`.
        loss: logits [B T V] -> (scalar, auxiliary value).
        **options: Further arguments of `decode`.

    Returns:
        Tensor name -> gradient, and the auxiliary value.
    """
    card = model.card
    names = [entry.name for entry in delta.header.entries if isinstance(entry, Dense)]
    all_linear = len(names) == len(delta.header.entries) and all(_is_linear(card, n) for n in names)
    if not all_linear or any(bound.header.stack for bound in model.deltas):
        names = []
    paths = {name: module_path(name) for name in names if name.endswith(".weight")}
    other_tensors = {name: tensor for name, tensor in delta.tensors.items() if name not in paths}

    def perturbed_loss(variables: Mapping[str, Mapping[str, Tensor]]):
        tensors = {**delta.tensors, **variables["rest"]}
        bound = bind(model, delta._replace(tensors=tensors), check=False)
        logits, activations = record_activations(
            bound.decode,
            bound.params,
            batch,
            paths.values(),
            perturbations=variables["perturbations"],
            **options,
        )
        value, aux = loss(logits)
        return value, (aux, {path: activations[path].input for path in paths.values()})

    start = {
        "rest": other_tensors,
        "perturbations": zero_perturbations(card, batch, paths.values()),
    }
    grads, (aux, inputs) = grad(perturbed_loss, has_aux=True)(start)
    gradients: dict[str, Tensor | FactoredGradient] = dict(grads["rest"])
    for name, path in paths.items():
        left, right = (
            grads["perturbations"][path],
            inputs[path].reshape(*batch.hidden_states.shape[:2], -1),
        )
        is_transposed = path in card.transposed
        gradients[name] = (
            FactoredGradient(right, left, batch.edit_index)
            if is_transposed
            else FactoredGradient(left, right, batch.edit_index)
        )
    return gradients, aux


def _is_linear(card: ModelCard, name: str) -> bool:
    """Whether a parameter is weight or bias of a linear map in a decoder layer, and not tied."""
    path = module_path(name)
    return (
        card.layer_of(path) is not None
        and path in card.linear_shapes
        and card.all_names(name) == [name]
    )


def weight_gradient(factors: GradientFactors) -> Tensor:
    """Compute the weight gradient of each row: the sum over tokens of delta u^T.

    Args:
        factors: The factors of one linear map.

    Returns:
        [B O I].

    Example:
        >>> weight_gradient(GradientFactors(torch.ones(1, 2, 3), torch.ones(1, 2, 1)))
        tensor([[[2., 2., 2.]]])
    """
    return torch.einsum("bto,bti->boi", factors.output_grad, factors.input)
