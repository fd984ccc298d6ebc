"""MEND: a trained network turns the gradient of an edit into an update that generalises.

The gradient of the edit's loss at a linear map is sum_t delta_t u_t^T. A network g (`network.py`)
maps each token's factors:

    dW = alpha * sum_t delta~_t u~_t^T,    (u~_t, delta~_t) = g(u_t, delta_t),    W' = W + dW

with alpha learned per map. The update is kept as its factors, A = u~ and B = alpha delta~: its rank
is the number of tokens that carry a gradient, and no dense matrix is formed. The update is added to
the output in fp32, so it is not lost to rounding as half-precision W + dW would be.

Training minimises, over g and alpha, with p the base and p' the edited model,

    c_edit * NLL_p'(edit, rephrased) + c_image * NLL_p'(other image) + c_loc * KL(p || p')

Sources: Mitchell et al. 2022, "Fast Model Editing at Scale"; eric-mitchell/mend; EasyEdit's
`trainer/algs/MEND.py` for the multimodal losses (whose decoder-only models were trained on logits
one position off). A sequence of edits differentiates the edited model each time and adds rows.

Cost of an edit: one forward to the lowest site, one forward and backward above it, and g.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.editors.common import checkpoint
from errata.editors.common.guards import guarded
from errata.editors.mend.config import MendConfig
from errata.editors.mend.network import (
    GradientStatistics,
    GradientTransform,
    PackedFactors,
    init_statistics,
    init_transform,
    pack_factors,
    transform_factors,
    update_statistics,
)
from errata.editors.training.batches import TrainingBatch
from errata.editors.training.loss import batch_loss
from errata.editors.training.trainable import TrainableEditor
from errata.functional import Batch, Delta, Editor, EditRecord, Header, Model, Query
from errata.functional.binding.bound_model import bind
from errata.functional.deltas.records import base_identity, make_header
from errata.functional.errors import UnknownSiteError, join_messages
from errata.functional.forward import prefix
from errata.functional.gradients.factors import gradient_factors
from errata.functional.gradients.losses import nll
from errata.functional.kinds.schema import LowRank

__all__ = [
    "MendState",
    "MendWeights",
    "mend_editor",
    "mend_trainable",
]


class MendWeights(NamedTuple):
    """What is trained: a network per shape of map, and alpha per map."""

    networks: dict[str, GradientTransform]
    edit_lrs: dict[str, Tensor]


class MendState(NamedTuple):
    """State of MEND: the trained part, what it whitens by, and the edits so far."""

    weights: MendWeights
    statistics: dict[str, GradientStatistics]
    config: MendConfig
    tensors: dict[str, Tensor] = {}
    edit_ranks: tuple[int, ...] = ()  # rows of each edit so far
    edits: tuple[EditRecord, ...] = ()
    is_trained: bool = False


def mend_editor(config: MendConfig = MendConfig()) -> Editor:
    """MEND as an editor: a `lowrank` delta, its rows tagged by edit, added in fp32.

    Removing one edit of a sequence drops its rows. Later edits were computed with it present.

    Args:
        config: The settings.

    Returns:
        The editor.

    Raises:
        UnknownSiteError: If a site matches no linear map.
        InvalidInputError: If a file of trained weights is missing or does not fit.

    References:
        Mitchell et al. 2022, "Fast Model Editing at Scale", arXiv:2110.11309. EasyEdit trains
        decoder-only models on logits one position off; this does not.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> site = "layers.-1.mlp.down"
        >>> config = MendConfig(sites=(site,), rank=4, edit_lr=-0.1, untrained=True)
        >>> editor = mend_editor(config)
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
        >>> tokens = model.preprocess([Query("who is it?", "bo")]).labels.shape[1]
        >>> delta.header.entries[0].edit_ranks == (tokens,)
        True
    """

    def init(model: Model, generator: torch.Generator) -> MendState:
        state = _init_state(model, config, generator)
        if not config.weights:
            return state
        is_shipped = config.weights == "shipped"
        path = checkpoint.shipped_weights("mend", model) if is_shipped else config.weights
        loaded = checkpoint.load_checkpoint(
            path, _trained_weights(state), _compatibility(model, config)
        )
        weights = MendWeights(loaded["networks"], loaded["edit_lrs"])
        return state._replace(weights=weights, statistics=loaded["statistics"], is_trained=True)

    def edit(model: Model, state: MendState, queries: Sequence[Query]) -> tuple[Delta, MendState]:
        batch = _run_to_sites(model, config, queries)
        packed = _pack_gradients(model, state, config, batch, scale=1 / len(queries))
        num_tokens = torch.stack([one.token_mask.sum(-1) for one in packed.values()]).amax(0)  # [E]
        edit_ranks = tuple(num_tokens.clamp_min(1).tolist())
        tensors = {}
        for name, new_rows in _compute_updates(model, state, packed).items():
            axis = 0 if name.endswith(".A") else 1
            edit_rows = [part.narrow(axis, 0, rank) for part, rank in zip(new_rows, edit_ranks)]
            before = [state.tensors[name]] if state.edits else []
            tensors[name] = torch.cat([*before, *edit_rows], axis)
        delta = _make_delta(model, config, state, tensors, state.edit_ranks + edit_ranks, queries)
        return delta, state._replace(
            tensors=tensors, edit_ranks=state.edit_ranks + edit_ranks, edits=delta.header.edits
        )

    def edit_each(model: Model, state: MendState, queries: Sequence[Query]) -> Delta:
        packed = _pack_gradients(model, state, config, _run_to_sites(model, config, queries))
        tensors = {}
        for name, new_rows in _compute_updates(model, state, packed).items():
            before = [state.tensors[name].expand(len(queries), -1, -1)] if state.edits else []
            tensors[name] = torch.cat([*before, new_rows], 1 if name.endswith(".A") else 2)
        return _make_delta(model, config, state, tensors, (), queries, stack=len(queries))

    return guarded(Editor("mend", config, init, edit, edit_each))


def mend_trainable(config: MendConfig = MendConfig()) -> TrainableEditor:
    """How MEND is trained by `fit`: every case of a batch is edited independently.

    Args:
        config: Settings.

    Returns:
        The editor with its loss and sites.
    """
    editor = mend_editor(config)

    def prepare(model: Model, state: MendState, training_batch: TrainingBatch, is_training: bool):
        packed = _pack_gradients(model, state, config, training_batch.edits)
        if is_training:
            statistics = dict(state.statistics)
            for site, group, _ in _resolve_maps(model, config):
                statistics[group] = update_statistics(statistics[group], packed[site])
            state = state._replace(statistics=statistics)
        return state, (training_batch, packed)

    def loss(
        model: Model, state: MendState, prepared: tuple[TrainingBatch, dict[str, PackedFactors]]
    ):
        training_batch, packed = prepared
        tensors = _compute_updates(model, state, packed)
        header = _make_header(
            model, config, state, tensors, (), training_batch.queries, len(training_batch.queries)
        )
        return batch_loss(bind(model, Delta(header, tensors), check=False), training_batch)

    return TrainableEditor(
        editor=editor,
        loss=loss,
        sites=lambda model: model.card.match_linears(config.sites),
        parameters=lambda state: state.weights,
        with_parameters=lambda state, weights: state._replace(weights=weights, is_trained=True),
        prepare=prepare,
        weights=_trained_weights,
        compatibility=lambda model: _compatibility(model, config),
        append_eos=config.append_eos,
    )


def _compatibility(model: Model, config: MendConfig) -> dict[str, Any]:
    """What a trained state fits: the architecture of the network, and the sites' own values."""
    names = [path + ".weight" for path in model.card.match_linears(config.sites)]
    base = base_identity(model, names)
    return {
        "editor": "mend",
        "sites": list(config.sites),
        "rank": config.rank,
        "num_hidden_layers": config.num_hidden_layers,
        "combine": config.combine,
        "append_eos": config.append_eos,
        "family": base.family,
        "parameter_hashes": base.parameter_hashes,
    }


def _trained_weights(state: MendState) -> dict[str, Any]:
    """What a file of a trained state holds."""
    return {**state.weights._asdict(), "statistics": state.statistics}


def _resolve_maps(model: Model, config: MendConfig) -> list[tuple[str, str, int]]:
    """Each edited map: its path, the group of its shape, its number in the group."""
    maps, counts = [], Counter()
    for path in model.card.match_linears(config.sites):
        out_dim, in_dim = model.card.linear_shapes[path]
        group = f"{in_dim}x{out_dim}"
        maps.append((path, group, counts[group]))
        counts[group] += 1
    outside = [path for path, _, _ in maps if model.card.layer_of(path) is None]
    if outside:
        raise UnknownSiteError(
            f"sites of MEND must be linear maps of decoder layers, and {join_messages(outside)} "
            "is not."
        )
    return maps


def _init_state(model: Model, config: MendConfig, generator: torch.Generator) -> MendState:
    maps = _resolve_maps(model, config)
    networks, statistics = {}, {}
    for group, num_maps in Counter(group for _, group, _ in maps).items():
        in_dim, out_dim = map(int, group.split("x"))
        networks[group] = init_transform(
            in_dim,
            out_dim,
            num_maps,
            rank=config.rank,
            num_layers=config.num_hidden_layers + 1,
            combine=config.combine,
            generator=generator,
        )
        statistics[group] = init_statistics(in_dim, out_dim)
    device = model.params[maps[0][0] + ".weight"].device
    edit_lrs = {
        path: torch.tensor(config.edit_lr, dtype=torch.float32, device="cpu") for path, _, _ in maps
    }
    weights, statistics = pytree.tree_map(
        lambda t: t.to(device), (MendWeights(networks, edit_lrs), statistics)
    )
    return MendState(weights, statistics, config)


def _run_to_sites(model: Model, config: MendConfig, queries: Sequence[Query]) -> Batch:
    names = [path + ".weight" for path, _, _ in _resolve_maps(model, config)]
    inputs = (
        model.preprocess(queries, append_eos=True)
        if config.append_eos
        else model.preprocess(queries)
    )
    return cast(Batch, prefix.run_prefix(model, inputs, prefix.edit_depth(model.card, names)))


def _pack_gradients(
    model: Model, state: MendState, config: MendConfig, batch: Batch, scale: float = 1.0
) -> dict[str, PackedFactors]:
    """The factors of each row's gradient, under the edits there are."""
    sites = [path for path, _, _ in _resolve_maps(model, config)]
    if state.edits:
        header = _make_header(model, config, state, state.tensors, state.edit_ranks, (), 0)
        model = bind(model, Delta(header, state.tensors), check=False)
    batch = batch._replace(edit_index=torch.zeros_like(batch.edit_index))
    factors_by_site = gradient_factors(
        model, batch, sites, loss=lambda logits, b: scale * nll(logits, b.labels).sum()
    )
    return {site: pack_factors(one) for site, one in factors_by_site.items()}


def _compute_updates(
    model: Model, state: MendState, packed: Mapping[str, PackedFactors]
) -> dict[str, Tensor]:
    """A [E R I] and B [E O R] of every map, R the most tokens that any edit has at any map."""
    max_rank = max(one.token_mask.shape[1] for one in packed.values())
    tensors = {}
    for site, group, map_index in _resolve_maps(model, state.config):
        update = transform_factors(
            state.weights.networks[group], state.statistics[group], map_index, packed[site]
        )
        padding = (0, 0, 0, max_rank - update.token_mask.shape[1])
        tensors[site + ".weight.A"] = F.pad(update.input, padding)
        tensors[site + ".weight.B"] = F.pad(
            state.weights.edit_lrs[site] * update.output_grad, padding
        ).mT
    return tensors


def _make_header(
    model: Model,
    config: MendConfig,
    state: MendState,
    tensors: Mapping[str, Tensor],
    edit_ranks: tuple[int, ...],
    queries: Sequence[Query],
    stack: int,
) -> Header:
    entries = tuple(
        LowRank(
            name=path + ".weight",
            checkpoint_name=model.card.checkpoint_name(path + ".weight"),
            shape=tuple(model.params[path + ".weight"].shape),
            rank=tensors[path + ".weight.A"].shape[-2],
            edit_ranks=edit_ranks,
            shared_ranks=state.edit_ranks if stack else (),
            transposed=path in model.card.transposed,
        )
        for path, _, _ in _resolve_maps(model, config)
    )
    settings = msgspec.structs.replace(
        config, weights=Path(config.weights).name
    )  # no one's folders
    return make_header(
        model,
        "mend",
        settings,
        entries,
        queries,
        earlier_edits=state.edits,
        arithmetic="act_fp32",
        stack=stack,
    )


def _make_delta(
    model: Model,
    config: MendConfig,
    state: MendState,
    tensors: Mapping[str, Tensor],
    edit_ranks: tuple[int, ...],
    queries: Sequence[Query],
    stack: int = 0,
) -> Delta:
    header = _make_header(model, config, state, tensors, edit_ranks, queries, stack)
    return Delta(header, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})
