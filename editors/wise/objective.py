"""WISE's edit site, its prepared rows, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from errata.editors.wise.config import WiseConfig
from errata.functional import Batch, Model
from errata.functional.forward import batches, prefix
from errata.functional.forward.grouped_linear import grouped_linear
from errata.functional.gradients.losses import nll
from errata.functional.kinds.masked.apply import activation_distance, gate_statistic, gated_tokens
from errata.functional.kinds.masked.entry import Activation

__all__ = ["EditSite", "PreparedRows", "margin_terms", "take_prepared", "wise_loss"]


class EditSite(NamedTuple):
    """The linear map with the side memories.

    Attributes:
        path: Path of the module.
        layer: Number of its decoder layer.
        size: (O, I): output and input width.
        transposed: Whether the weight is stored [I O].
        activation: Activation function before outputs are compared.
    """

    path: str
    layer: int
    size: tuple[int, int]
    transposed: bool
    activation: Activation

    @property
    def weight(self) -> str:
        """The name of the map's weight."""
        return f"{self.path}.weight"


class PreparedRows(NamedTuple):
    """The edited rows before the site's layer, and the site's activations at the tokens of prompts.

    Each row has U + 1 prompts: its own, then U unrelated ones.

    Attributes:
        batch: R rows. `edit_index` is the memory that a row trains.
        inputs: Inputs of the map [R U+1 n I].
        outputs: Outputs of the unedited map [R U+1 n O].
        token_mask: Tokens that the gate counts [R U+1 n] bool.
    """

    batch: Batch
    inputs: Tensor
    outputs: Tensor
    token_mask: Tensor


def take_prepared(ready: PreparedRows, index: Tensor | slice) -> PreparedRows:
    """Select some of the rows.

    Args:
        ready: The rows, R of them.
        index: Indices [R'] or a slice.

    Returns:
        The selected rows.
    """
    return PreparedRows(batches.take_rows(ready.batch, index), *(part[index] for part in ready[1:]))


def wise_loss(
    model: Model, site: EditSite, prepared: PreparedRows, config: WiseConfig
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Make the function that evaluates side memories on prepared rows.

    Args:
        model: The base model.
        site: The map with the memories.
        prepared: The rows, R of them with U unrelated prompts each.
        config: The settings.

    Returns:
        A function (maps [E O I], with_answers=True) -> (NLL of each row [R], activation of its own
        prompt [R], activations of its unrelated prompts [R U]). Without answers the first is a copy
        of the second, and the layers after the site do not run.
    """
    batch = prepared.batch
    count, length = batch.hidden_states.shape[:2]
    # EasyEdit trains with the mean. Only its inference takes the maximum over long prompts.
    statistic = "mean" if config.gate_statistic == "easyedit" else config.gate_statistic
    own_mask, own_prompts, unrelated_prompts = (
        gated_tokens(batch, statistic),
        _pack_prompts(prepared, 0),
        _pack_prompts(prepared, 1),
    )
    # Whole rows contain their own prompt's tokens, so these need no second product.
    covers_own_prompt = own_mask.shape[1] == length and torch.equal(
        own_mask.sum(1), prepared.token_mask[:, 0].sum(1)
    )

    def activations(added: Tensor, prompts: _PackedPrompts) -> Tensor:
        token_distances = activation_distance(prompts.outputs, added, site.activation)
        padded_distances = token_distances.new_zeros(count, prompts.token_mask[0].numel()).scatter(
            1, prompts.token_index, token_distances
        )
        return gate_statistic(
            padded_distances.view(prompts.token_mask.shape), prompts.token_mask, statistic
        )

    def loss_terms(maps: Tensor, with_answers: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        gate_activations: list[Tensor] = []

        def hook(x: Tensor, y: Tensor) -> Tensor:
            inputs = x.reshape(count, length, -1).float()
            if covers_own_prompt:
                product = grouped_linear(
                    torch.cat([inputs, unrelated_prompts.inputs], 1), maps, batch.edit_index
                )
                added, unrelated_added = product[:, :length], product[:, length:]
                token_distances = activation_distance(
                    y.reshape(added.shape), added, site.activation
                )
                inside = gate_statistic(token_distances, own_mask, statistic)
                gate_activations.append(
                    torch.cat([inside[:, None], activations(unrelated_added, unrelated_prompts)], 1)
                )
            else:
                added = grouped_linear(inputs, maps, batch.edit_index)
            return (y + added.reshape(y.shape)).to(y.dtype)

        answer = None
        if with_answers:
            answer = nll(prefix.decode_scored(model, batch, {site.path: hook}), batch.labels)
        if not gate_activations:
            gate_activations.append(
                activations(grouped_linear(own_prompts.inputs, maps, batch.edit_index), own_prompts)
            )
        activations_per_prompt = gate_activations[0]  # [R U+1]
        return (
            activations_per_prompt[:, 0] if answer is None else answer,
            activations_per_prompt[:, 0],
            activations_per_prompt[:, 1:],
        )

    return loss_terms


class _PackedPrompts(NamedTuple):
    """The prompts of each row in one sequence, without the padding between them.

    Attributes:
        inputs: Inputs of the map [R T I].
        outputs: Outputs of the unedited map [R T O].
        token_index: Index of each token among the P n tokens of the row [R T].
        token_mask: Tokens that the gate counts [R P n] bool.
    """

    inputs: Tensor
    outputs: Tensor
    token_index: Tensor
    token_mask: Tensor


def _pack_prompts(prepared: PreparedRows, first: int) -> _PackedPrompts:
    """Pack the prompts from number `first` on."""
    token_mask = prepared.token_mask[:, first:]
    flat_mask = token_mask.flatten(1)
    token_index = (
        (~flat_mask).int().argsort(dim=1, stable=True)[:, : max(1, int(flat_mask.sum(1).max()))]
    )
    inputs, outputs = (
        part[:, first:]
        .flatten(1, 2)
        .gather(1, token_index[..., None].expand(*token_index.shape, part.shape[-1]))
        for part in (prepared.inputs, prepared.outputs)
    )
    return _PackedPrompts(inputs, outputs, token_index, token_mask)


def margin_terms(
    inside: Tensor, outside: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """Compute the loss that keeps activations of edits above those of unrelated prompts.

        mean [out - in + gamma]_+ + mean [out - alpha]_+ + mean [beta - in]_+

    Each is a mean over its positive terms, the first over all pairs.

    Args:
        inside: Activations of edits [... P].
        outside: Activations of unrelated prompts [... U].
        alpha: Activation that unrelated prompts must stay below.
        beta: Activation that edits must exceed.
        gamma: Margin between the two.

    Returns:
        The loss [...].

    References:
        Wang et al. 2024, eq. 6.

    Example:
        >>> margin_terms(torch.tensor([15.0]), torch.tensor([7.0, 4.0]), 5.0, 20.0, 10.0)
        tensor(9.)
    """
    pairs = (outside[..., None] - inside[..., None, :] + gamma).flatten(-2)
    return _mean_positive(pairs) + _mean_positive(outside - alpha) + _mean_positive(beta - inside)


def _mean_positive(values: Tensor) -> Tensor:
    """Average the positive values over the last axis. 0 if there are none."""
    return values.clamp_min(0).sum(-1) / (values > 0).sum(-1).clamp_min(1)
