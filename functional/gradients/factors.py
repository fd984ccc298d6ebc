"""Per-edit gradients as factors: the input of a linear map and the gradient at its output.

For y = W u and a loss L, dL/dW = sum_t delta_t u_t^T with delta = dL/dy. The two factors are read
off a decode with zero probes (`taps.py`); no weight gradient is formed, no parameter asks for one,
and rows keep apart, so one backward pass gives the factors of every edit in the batch.

Source: Mitchell et al. 2022, "Fast Model Editing at Scale" (MEND), section 3. Legend: B rows ·
L tokens · I in · O out.
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
    """One linear map's part of the gradient, row by row."""

    input: Tensor  # u [B L I]
    output_grad: Tensor  # dL/dy [B L O]


def sum_nll(logits: Tensor, batch: Batch) -> Tensor:
    """The negative log-likelihood of each row's target, summed over rows: rows stay independent."""
    return nll(logits, batch.labels).sum()


def gradient_factors(
    model: Model,
    batch: Batch,
    sites: Iterable[str],
    *,
    loss: Callable[[Tensor, Batch], Tensor] = sum_nll,
    hooks: Hooks | None = None,
) -> dict[str, GradientFactors]:
    """(u, delta) of each linear map at `sites` (full paths), for loss(logits, batch) -> scalar.

    With a loss that sums over rows each row's factors are that row's own gradient. Sites must lie
    at or above the batch's depth. Works under `vmap` and inside `grad` (meta-learning).

        found = factors(model, batch, ["model.layers.3.mlp.down_proj"])
        gradient(found["model.layers.3.mlp.down_proj"])      # [B O I]
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
    """Gradients of loss(logits) -> (scalar, aux) for a stacked dense delta, and aux.

    Those of linear weights come as factors (`FactoredGradient`), which a donating optimiser takes
    as they
    are: for large matrices and few scored tokens this saves most of a step's memory traffic. Other
    parameters get plain gradients [E ...], and so do all where edits have to run apart (a norm's
    scale is among them). `options` go to `decode`.
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
    """Whether a parameter is nothing but weight or bias of one linear map in a decoder layer."""
    path = module_path(name)
    return (
        card.layer_of(path) is not None
        and path in card.linear_shapes
        and card.all_names(name) == [name]
    )


def weight_gradient(factors: GradientFactors) -> Tensor:
    """The weight gradient of each row, [B O I]: sum over tokens of delta u^T.

    >>> weight_gradient(GradientFactors(torch.ones(1, 2, 3), torch.ones(1, 2, 1)))
    tensor([[[2., 2., 2.]]])
    """
    return torch.einsum("bto,bti->boi", factors.output_grad, factors.input)
