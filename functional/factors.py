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

from .bind import bind
from .card import ModelCard
from .grouped import Unformed
from .header import Dense
from .losses import nll
from .places import module_of, uses
from .taps import tap, zeros
from .types import Batch, Delta, Model, Rewrites

__all__ = ["Factor", "factors", "gradient", "rows_nll", "unformed_gradients"]


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


def unformed_gradients(
    model: Model,
    delta: Delta,
    batch: Batch,
    loss: Callable[[Tensor], tuple[Tensor, Any]],
    **options: Any,
) -> tuple[dict[str, Tensor | Unformed], Any]:
    """Gradients of loss(logits) -> (scalar, aux) for a stacked dense delta, and aux.

    Those of linear weights come as factors (`Unformed`), which a donating optimiser takes as they
    are: for large matrices and few scored tokens this saves most of a step's memory traffic. Other
    parameters get plain gradients [E ...], and so do all where edits have to run apart (a norm's
    scale is among them). `options` go to `decode`.
    """
    card = model.card
    names = [entry.name for entry in delta.header.entries if isinstance(entry, Dense)]
    together = len(names) == len(delta.header.entries) and all(_is_linear(card, n) for n in names)
    if not together or any(bound.header.stack for bound in model.deltas):
        names = []
    paths = {name: module_of(name) for name in names if name.endswith(".weight")}
    rest = {name: tensor for name, tensor in delta.tensors.items() if name not in paths}

    def probed(wanted: Mapping[str, Mapping[str, Tensor]]):
        tensors = {**delta.tensors, **wanted["rest"]}
        bound = bind(model, delta._replace(tensors=tensors), check=False)
        logits, seen = tap(
            bound.decode, bound.params, batch, paths.values(), probes=wanted["probes"], **options
        )
        value, aux = loss(logits)
        return value, (aux, {path: seen[path].input for path in paths.values()})

    start = {"rest": rest, "probes": zeros(card, batch, paths.values())}
    grads, (aux, inputs) = grad(probed, has_aux=True)(start)
    found: dict[str, Tensor | Unformed] = dict(grads["rest"])
    for name, path in paths.items():
        left, right = grads["probes"][path], inputs[path].reshape(*batch.hidden.shape[:2], -1)
        flip = path in card.transposed
        found[name] = (
            Unformed(right, left, batch.edit) if flip else Unformed(left, right, batch.edit)
        )
    return found, aux


def _is_linear(card: ModelCard, name: str) -> bool:
    """Whether a parameter is nothing but weight or bias of one linear map in a decoder layer."""
    path = module_of(name)
    return card.layer_of(path) is not None and path in card.linears and uses(card, name) == [name]


def gradient(factor: Factor) -> Tensor:
    """The weight gradient of each row, [B O I]: sum over tokens of delta u^T.

    >>> gradient(Factor(torch.ones(1, 2, 3), torch.ones(1, 2, 1)))
    tensor([[[2., 2., 2.]]])
    """
    return torch.einsum("bto,bti->boi", factor.delta, factor.input)
