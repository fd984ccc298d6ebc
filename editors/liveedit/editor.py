"""LiveEdit: each edit is a low-rank expert made by a trained network, routed by image and question.

An edit is one forward pass up to a layer. From the layer's output at the edit's image V, prompt Q
and answer A, trained networks (`networks.py`) generate two routing keys and the factors of an
expert; `functional/kinds/experts/apply.py` routes and applies experts. Nothing is optimised,
earlier experts never change, and an edit is undone by removing its expert. An edit of the same
question about the same images replaces the earlier one.

Training minimises, over batches of E independent edits,

    L = sum of weights * NLL(p', target)        where an edit should act: its expert, some others
      + sum of weights * KL(p || p')            localities: some of the batch's experts
      + soft + hard + margin                    routing, `losses.py`

Source: LiveEdit (CVPR 2025, arXiv 2411.15432), qizhou000/LiveEdit. Different from the original:

* Training runs the layers after the edited one on h + residual. There the edited layer's output
  is fed into that layer again, which no inference does.
* Distractor experts are a random subset of the batch's, not a prefix of the batch: there the first
  expert is a distractor in 8 of 9 steps and the last in 1 of 9.
* All kinds of localities are trained on, text included; there only those with an image.
* With `routing_input="query_and_vision"` the chosen experts are weighted by vision too: a query
  alone cannot tell two similar entities with the same question apart.
* The margin loss compares each expert with the sentinel, as the gate does. The hard loss is a
  softmax over the batch's experts, and lets any of them pass the gate as long as it is not the
  largest.
* Half of a batch's experts are generated from the answer alone, so that the generator learns to
  read it instead of memorising the training answers.
* With `min_self_margin` an edit's vision key is scaled until its own question passes the gate by
  that margin; there nothing ensures that an edit acts at all.
* With `num_answer_positions` the generator sees the order of an answer's tokens; there it does not.
* Edits and questions without an image work.
* Many edits are generated in one forward pass, independently of each other.

Legend: B rows · E edits · N experts · D width · S query tokens · K width of a feature · R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.editors.common import checkpoint
from errata.editors.common.guards import guarded
from errata.editors.liveedit.config import LiveEditConfig
from errata.editors.liveedit.losses import liveedit_loss
from errata.editors.liveedit.networks import (
    ExpertPool,
    LiveEditNetworks,
    fold_queries,
    init_networks,
    make_pool,
)
from errata.editors.liveedit.pool import (
    LiveEditState,
    _add_edit,
    _pad_pool,
    _raise_self_margin,
    new_buffer,
)
from errata.editors.training.batches import TrainingBatch
from errata.editors.training.trainable import TrainableEditor
from errata.functional import Batch, Delta, Editor, EditRecord, Header, Model, Query
from errata.functional.deltas.records import base_identity, make_header
from errata.functional.errors import InvalidSettingsError
from errata.functional.forward import prefix
from errata.functional.forward.activations import record_activations
from errata.functional.kinds.schema import Experts

__all__ = [
    "EditSite",
    "generate_experts",
    "liveedit_editor",
    "liveedit_trainable",
    "resolve_edit_site",
]


class EditSite(NamedTuple):
    """The layer whose output experts are added to, and the weight that names it."""

    weight: str
    path: str
    layer: int


def liveedit_editor(config: LiveEditConfig = LiveEditConfig()) -> Editor:
    """LiveEdit as an editor: a pool of `experts` at the output of one layer.

    Networks generate an expert and its keys from each edit. Untrained networks change answers at
    random: train them with `errata train`, or use shipped weights.

    Args:
        config: The settings.

    Returns:
        The editor.

    Raises:
        InvalidSettingsError: If the layer is the last one, or sizes do not fit the model.
        InvalidInputError: If a file of trained weights is missing or does not fit.

    References:
        Chen et al. 2025, "Lifelong Knowledge Editing for Vision Language Models with Low-Rank
        Mixture-of-Experts", arXiv:2411.15432. Answer tokens never enter the gate here.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> editor = liveedit_editor(LiveEditConfig(feature_dim=8, num_heads=2, untrained=True))
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> for target in ("bo", "owl"):
        ...     delta, state = editor.edit(model, state, [Query("who is it?", target)])
        >>> delta.header.entries[0].edit_slots
        (-1, 0)
    """

    def init(model: Model, generator: torch.Generator) -> LiveEditState:
        state = _init_state(model, config, generator)
        if not config.weights:
            return state
        is_shipped = config.weights == "shipped"
        path = checkpoint.shipped_weights("liveedit", model) if is_shipped else config.weights
        networks = checkpoint.load_checkpoint(path, state.networks, _compatibility(model, config))
        return state._replace(networks=networks, is_trained=True)

    def edit(
        model: Model, state: LiveEditState, queries: Sequence[Query]
    ) -> tuple[Delta, LiveEditState]:
        records = _make_header(model, config, (), queries).edits
        new_experts = generate_experts(model, state.networks, config, queries)
        for row, record in enumerate(records):
            state = _add_edit(
                state, record, ExpertPool(*(part[row : row + 1] for part in new_experts))
            )
        header = _make_header(
            model,
            config,
            state.edit_slots,
            queries,
            state.edits[: -len(records)],
            num_experts=state.num_experts,
        )
        return Delta(header, _delta_tensors(model, config, state.networks, state.pool)), state

    def edit_each(model: Model, state: LiveEditState, queries: Sequence[Query]) -> Delta:
        records = _make_header(model, config, (), queries).edits
        new_experts = generate_experts(model, state.networks, config, queries)
        single_states = [
            _add_edit(state, record, ExpertPool(*(part[row : row + 1] for part in new_experts)))
            for row, record in enumerate(records)
        ]
        longest = max(one.num_experts for one in single_states)
        pools = [_pad_pool(one.pool, longest) for one in single_states]
        pool = ExpertPool(*(torch.stack(parts) for parts in zip(*pools)))
        edit_slots = tuple(one.edit_slots[-1] for one in single_states)
        replaced = [
            [n for n, slot in enumerate(state.edit_slots) if slot == one.edit_slots[-1]]
            for one in single_states
        ]
        header = _make_header(
            model,
            config,
            edit_slots,
            queries,
            earlier=state.edits,
            num_experts=longest,
            stack=len(queries),
            shared_slots=state.edit_slots,
            replaced_edits=replaced,
        )
        return Delta(header, _delta_tensors(model, config, state.networks, pool))

    return guarded(Editor("liveedit", config, init, edit, edit_each))


def liveedit_trainable(config: LiveEditConfig = LiveEditConfig()) -> TrainableEditor:
    """How LiveEdit is trained by `fit`: the edits of a batch are distractors of one another.

    Args:
        config: Settings.

    Returns:
        The editor with its loss and sites.
    """

    def loss(model: Model, state: LiveEditState, training_batch: TrainingBatch):
        return liveedit_loss(config, model, state.networks, training_batch)

    def sites(model: Model):
        # training runs only the layers after the edited one
        next_layer = f"{model.card.layers}.{resolve_edit_site(model, config).layer + 1}."
        return [path for path in model.card.linear_shapes if path.startswith(next_layer)]

    return TrainableEditor(
        editor=liveedit_editor(config),
        loss=loss,
        sites=sites,
        parameters=lambda state: state.networks,
        with_parameters=lambda state, networks: state._replace(networks=networks, is_trained=True),
        prepare=lambda model, state, training_batch, is_training: (state, training_batch),
        weights=lambda state: state.networks,
        compatibility=lambda model: _compatibility(model, config),
        append_eos=config.append_eos,
    )


def resolve_edit_site(model: Model, config: LiveEditConfig) -> EditSite:
    """Find the decoder layer that the settings name.

    A fraction of the depth leaves a layer above it.

    Args:
        model: Model to edit.
        config: Settings.

    Returns:
        Path and number of the layer.

    Raises:
        InvalidSettingsError: For the last layer and for numbers that are no layer.
    """
    card, layer = model.card, config.layer
    if isinstance(layer, float):
        layer = max(0, min(int(card.num_layers * layer), card.num_layers - 2))
    number = layer + card.num_layers if layer < 0 else layer
    if not 0 <= number < card.num_layers - 1:
        raise InvalidSettingsError(
            f"experts must be at a layer of {card.id} that has one after it, 0 to "
            f"{card.num_layers - 2}; got {layer}."
        )
    path = f"{card.layers}.{number}"
    weights = [p for p in card.linear_shapes if p.startswith(f"{path}.")]
    return EditSite(f"{weights[-1]}.weight", path, number)


def generate_experts(
    model: Model, networks: LiveEditNetworks, config: LiveEditConfig, queries: Sequence[Query]
) -> ExpertPool:
    """Generate the experts and keys of many independent edits, in one forward pass up to the layer.

    Args:
        model: Model to edit.
        networks: Trained networks.
        config: Settings.
        queries: Edits.

    Returns:
        One expert and its keys per edit.
    """
    site = resolve_edit_site(model, config)
    inputs = (
        model.preprocess(queries, append_eos=True)
        if config.append_eos
        else model.preprocess(queries)
    )
    with torch.no_grad():
        batch = cast(Batch, prefix.run_prefix(model, inputs, prefix.EditDepth(layer=site.layer)))
        _, activations = record_activations(
            model.decode, model.params, batch, [site.path], stop=site.layer + 1
        )
        hidden_states = activations[site.path].output.reshape(*batch.attention_mask.shape, -1)
        pool = make_pool(networks, config, hidden_states, batch)
        return (
            _raise_self_margin(networks, config, pool, hidden_states, batch)
            if config.min_self_margin
            else pool
        )


def _compatibility(model: Model, config: LiveEditConfig) -> dict[str, Any]:
    """What a trained state fits: the architecture of the networks, and the layer."""
    site = resolve_edit_site(model, config)
    base = base_identity(model, [site.weight])
    fields = (
        "feature_dim",
        "num_query_tokens",
        "num_heads",
        "rank",
        "num_sentinel_tokens",
        "num_text_sentinel_tokens",
        "expert_scale",
        "routing_input",
        "num_answer_positions",
    )
    return {
        "editor": "liveedit",
        "layer": site.layer,
        **{name: getattr(config, name) for name in fields},
        "append_eos": config.append_eos,
        "family": base.family,
        "parameter_hashes": base.parameter_hashes,
    }


def _init_state(model: Model, config: LiveEditConfig, generator: torch.Generator) -> LiveEditState:
    site, hidden_size = resolve_edit_site(model, config), model.card.hidden_size
    messages = [
        f"{config.num_heads} heads must divide {what} {size}"
        for what, size in (
            ("the slots' width", config.feature_dim),
            ("the model's width", hidden_size),
        )
        if size % config.num_heads
    ]
    if messages:
        raise InvalidSettingsError(f"LiveEdit for {model.card.id}: {'; '.join(messages)}.")
    networks = init_networks(
        hidden_size,
        config.num_query_tokens,
        config.feature_dim,
        config.rank,
        config.num_sentinel_tokens,
        config.num_text_sentinel_tokens,
        generator,
        config.num_answer_positions,
    )
    device = model.params[site.weight].device
    networks = pytree.tree_map(lambda tensor: tensor.to(device), networks)
    key_size = config.num_query_tokens * config.feature_dim
    num_query_parts = 2 if config.routing_input == "query_and_vision" else 1
    factors = (0, config.rank, hidden_size)
    shapes = ((0, key_size + 2), (0, key_size * num_query_parts), factors, factors)
    empty = ExpertPool(
        *(torch.zeros(shape, device=device, dtype=torch.float32) for shape in shapes)
    )
    return LiveEditState(networks, new_buffer(empty))


def _make_header(
    model: Model,
    config: LiveEditConfig,
    edit_slots: tuple[int, ...],
    queries: Sequence[Query],
    earlier: tuple[EditRecord, ...] = (),
    num_experts: int = 1,
    stack: int = 0,
    shared_slots: tuple[int, ...] = (),
    replaced_edits: Sequence[Sequence[int]] = (),
) -> Header:
    site = resolve_edit_site(model, config)
    entry = Experts(
        name=site.weight,
        checkpoint_name=model.card.checkpoint_name(site.weight),
        shape=tuple(model.params[site.weight].shape),
        num_experts=num_experts,
        rank=config.rank,
        hidden_size=model.card.hidden_size,
        num_query_tokens=config.num_query_tokens,
        feature_dim=config.feature_dim,
        num_heads=config.num_heads,
        num_sentinel_tokens=config.num_sentinel_tokens,
        num_text_sentinel_tokens=config.num_text_sentinel_tokens,
        edit_slots=edit_slots,
        shared_slots=shared_slots,
        routing_input=config.routing_input,
        top_k=config.top_k,
    )
    settings = msgspec.structs.replace(
        config, weights=Path(config.weights).name
    )  # no one's folders
    return make_header(
        model,
        "liveedit",
        settings,
        (entry,),
        queries,
        earlier_edits=earlier,
        stack=stack,
        replaced_edits=replaced_edits,
    )


def _delta_tensors(
    model: Model, config: LiveEditConfig, networks: LiveEditNetworks, pool: ExpertPool
) -> Mapping[str, Tensor]:
    name = resolve_edit_site(model, config).weight
    extractor = fold_queries(networks.query_features, config.num_heads)._asdict()
    parts = {
        **pool._asdict(),
        **{field.replace("_", ".", 1): tensor for field, tensor in extractor.items()},
        "input_norm": networks.input_norm,
        "sentinel": networks.sentinel,
        "sentinel_text": networks.sentinel_text,
    }
    return {f"{name}.{part}": tensor.detach().contiguous() for part, tensor in parts.items()}
