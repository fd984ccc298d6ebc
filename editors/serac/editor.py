"""SERAC: edits are stored in a memory; a classifier decides which edit a question is in scope of.

The memory holds every edit in a small width. A classifier e compares each question t with the
edits by its prompt and images. If t is in scope, a small counterfactual model c, which sees the
edit too, answers instead of the base (formulas: `functional/kinds/scope/apply.py`; the network:
`functional/kinds/scope/network.py`):

    s = max_n exp(-|e(x_n) - e(t)|^2);   soft: (1 - s) p + s c,   hard: c if s > 1/2, else p

Training minimises, over classifier and c together, with the cases of a batch as one memory,

    NLL_c(its own edit) - log s_own - log(1 - max of the others)      where an edit should act
    - log(1 - max s)  (soft: + KL(p || mixture))                      where nothing should change

Both read the base's rows at depth 0 (embeddings, frozen visual features), and c is decoded by the
base's final norm and head, so there is no second tokenizer, vision tower or language model. An
answer is stored as the residual streams that the head reads as its tokens: with J the Jacobian of
the logits at the zero residual, centred, r_y = (J^T J / V + 3 mean I)^-1 J_y, to which c points.

Sources: Mitchell et al. 2022, "Memory-Based Model Editing at Scale" (arXiv 2206.06520),
eric-mitchell/serac; EasyEdit `trainer/algs/SERAC.py`; LiveEdit `serac_vl.py` for a classifier of
embeddings. Different from EasyEdit: the classifier never sees an answer, and it sees images (there
the same question about another image always fired); images reach c by a trained map (there random,
drawn again for each edit); keys are computed once (there again in every forward pass), and a
sequence keeps all edits (there the last).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.editors.common import checkpoint
from errata.editors.common.guards import guarded
from errata.editors.serac.config import SeracConfig
from errata.functional import Batch, Delta, Editor, EditRecord, Model, Query
from errata.functional.deltas.records import base_identity, make_header
from errata.functional.gradients.losses import scored_mask
from errata.functional.kinds.schema import Scope
from errata.functional.kinds.scope.algebra import pad_and_concat
from errata.functional.kinds.scope.apply import logits_from_states
from errata.functional.kinds.scope.entry import NetworkSizes
from errata.functional.kinds.scope.network import (
    ScopeNetwork,
    classify_scope,
    encode_edit,
    init_network,
    network_inputs,
    network_state_dict,
)

__all__ = [
    "EditSlots",
    "SeracState",
    "serac_editor",
    "unembedding_map",
]


class EditSlots(NamedTuple):
    """The edits in memory; rows of zeros are padding."""

    keys: Tensor  # [N 2K]
    answer_states: Tensor  # [N A d]
    image_states: Tensor  # [N m d]
    prompt_states: Tensor  # [N P d]
    answer_outputs: Tensor  # [N A D]


class SeracState(NamedTuple):
    """State of SERAC: the trained network, how the head is read backwards, the edits so far."""

    network: ScopeNetwork
    unembedding_map: Tensor  # [D D]
    slots: EditSlots
    edit_slots: tuple[int, ...] = ()  # the slot of each edit, -1 where a later one took it over
    edits: tuple[EditRecord, ...] = ()
    is_trained: bool = False


def serac_editor(config: SeracConfig = SeracConfig()) -> Editor:
    """SERAC as an editor: a `scope` entry, an edit memory with a classifier and a small decoder.

    The classifier sees prompt and image, never an answer. Outside every edit's scope the base
    answers.

    Args:
        config: The settings.

    Returns:
        The editor.

    Raises:
        InvalidInputError: If a file of trained weights is missing or does not fit.

    References:
        Mitchell et al. 2022, "Memory-Based Model Editing at Scale", arXiv:2206.06520.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> config = SeracConfig(dim=16, num_heads=2, ffn_dim=32, key_dim=8, untrained=True)
        >>> editor = serac_editor(config)
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
        >>> delta.header.entries[0].num_slots
        1
    """

    def init(model: Model, generator: torch.Generator) -> SeracState:
        sizes = _network_sizes(model, config)
        device = _embedding_name(model)[1].device
        network = pytree.tree_map(lambda t: t.to(device), init_network(sizes, generator))
        if config.weights:
            is_shipped = config.weights == "shipped"
            path = checkpoint.shipped_weights("serac", model) if is_shipped else config.weights
            network = checkpoint.load_checkpoint(path, network, _compatibility(model, config))
        shapes = (
            (2 * sizes.key_dim,),
            (0, sizes.dim),
            (sizes.num_image_queries, sizes.dim),
            (0, sizes.dim),
            (0, sizes.hidden_size),
        )
        empty = EditSlots(
            *(torch.zeros(0, *shape, device=device, dtype=torch.float32) for shape in shapes)
        )
        return SeracState(network, unembedding_map(model), empty, is_trained=bool(config.weights))

    def edit(model: Model, state: SeracState, queries: Sequence[Query]):
        new_slots = _encode_edits(model, state, config, queries)
        slots = EditSlots(*(pad_and_concat(pair) for pair in zip(state.slots, new_slots)))
        records = make_header(model, "serac", config, (), queries).edits
        edit_slots, slot_order = state.edit_slots, list(range(len(state.slots.keys)))
        for number, record in enumerate(records):
            slot = _slot_of_same_question(record, edit_slots, (*state.edits, *records[:number]))
            if slot is None:
                slot = len(slot_order)
                slot_order.append(len(state.slots.keys) + number)
            else:
                edit_slots = tuple(-1 if owner == slot else owner for owner in edit_slots)
                slot_order[slot] = len(state.slots.keys) + number
            edit_slots = (*edit_slots, slot)
        if slot_order != list(range(len(slots.keys))):
            slots = EditSlots(
                *(
                    part[torch.tensor(slot_order, device=part.device, dtype=torch.int64)]
                    for part in slots
                )
            )
        next_state = state._replace(slots=slots, edit_slots=edit_slots, edits=state.edits + records)
        return _make_delta(
            model, config, next_state, slots, queries, earlier=state.edits
        ), next_state

    def edit_each(model: Model, state: SeracState, queries: Sequence[Query]) -> Delta:
        new_slots = _encode_edits(model, state, config, queries)
        count = len(queries)
        expanded_slots = (part[None].expand(count, *part.shape) for part in state.slots)
        slots = EditSlots(
            *(pad_and_concat((old, new[:, None]), 1) for old, new in zip(expanded_slots, new_slots))
        )
        edit_slots, replaced = [], []
        for number, record in enumerate(make_header(model, "serac", config, (), queries).edits):
            slot = _slot_of_same_question(record, state.edit_slots, state.edits)
            edit_slots.append(slots.keys.shape[1] - 1 if slot is None else slot)
            replaced.append([n for n, s in enumerate(state.edit_slots) if s == slot])
            for part in slots:  # a replaced edit's slot occurs twice: the first counts
                part[number, edit_slots[-1]] = part[number, -1]
        next_state = state._replace(edit_slots=tuple(edit_slots))
        return _make_delta(
            model,
            config,
            next_state,
            slots,
            queries,
            earlier=state.edits,
            stack=count,
            shared_slots=state.edit_slots,
            replaced_edits=replaced,
        )

    return guarded(Editor("serac", config, init, edit, edit_each))


def unembedding_map(model: Model) -> Tensor:
    """Map an answer token's gradient to the residual stream that the head reads as that token.

    With J = dz/dh at h = 0 (one product with J per direction, in one batch), centred over the
    vocabulary: (J^T J / V + 3 mean(diag) I)^-1. Unlike the head's own row, which other words of a
    trained vocabulary outdo, the result is read as the word itself (the micro models: all 1,536
    words of the three, own rows 37 to 80 %), for any norm, tie or scale in between.

    Args:
        model: Model to edit.

    Returns:
        [D D].
    """
    embedding = _embedding_name(model)[1]
    hidden_size = model.card.hidden_size
    zero = embedding.new_zeros(1, hidden_size, hidden_size)
    basis = torch.eye(hidden_size, dtype=embedding.dtype, device=embedding.device)[None]
    edit_index = torch.zeros(1, dtype=torch.int64, device=embedding.device)

    def read_logits(hidden_states: Tensor) -> Tensor:
        return logits_from_states(model, model.params, hidden_states, edit_index)

    # J v as the gradient of <J^T u, v> in u: forward mode would go through torch.jit
    forward_vjp = torch.func.vjp(read_logits, zero)
    backward_vjp = torch.func.vjp(lambda u: forward_vjp[1](u)[0], torch.zeros_like(forward_vjp[0]))
    (jacobian,) = backward_vjp[1](basis)
    columns = jacobian[0].float()  # [D V]
    columns = columns - columns.mean(1, keepdim=True)
    square = columns @ columns.mT / columns.shape[1]
    mean = square.diagonal().mean()
    return torch.linalg.inv(
        square / mean + 3 * torch.eye(hidden_size, device=embedding.device, dtype=torch.float32)
    )


def _compatibility(model: Model, config: SeracConfig) -> dict[str, Any]:
    """What a trained state fits: the sizes of the network, and the base whose rows it reads."""
    base = base_identity(model, [_embedding_name(model)[0]])
    return {
        "editor": "serac",
        "sizes": msgspec.to_builtins(_network_sizes(model, config)),
        "append_eos": config.append_eos,
        "family": base.family,
        "parameter_hashes": base.parameter_hashes,
    }


def _trained_weights(state: SeracState) -> ScopeNetwork:
    """What a file of a trained state holds: the weights, in half the bytes."""
    return pytree.tree_map(lambda weight: weight.half(), state.network)


def _network_sizes(model: Model, config: SeracConfig) -> NetworkSizes:
    fields = (
        "dim",
        "num_heads",
        "num_classifier_layers",
        "num_counterfactual_layers",
        "ffn_dim",
        "key_dim",
        "num_image_queries",
    )
    return NetworkSizes(
        hidden_size=model.card.hidden_size, **{field: getattr(config, field) for field in fields}
    )


def _embedding_name(model: Model) -> tuple[str, Tensor]:
    """The token embedding, by which a base is known: the network reads its rows."""
    name = model.card.canonical_name(f"{model.card.token_embedding}.weight")
    if name not in model.params:
        name = model.card.canonical_name(f"{model.card.head}.weight")
    return name, model.params[name]


def _encode_edits(
    model: Model, state: SeracState, config: SeracConfig, queries: Sequence[Query]
) -> EditSlots:
    """One slot for each query, encoded once and for all."""
    with torch.no_grad():
        inputs = (
            model.preprocess(queries, append_eos=True)
            if config.append_eos
            else model.preprocess(queries)
        )
        batch = model.embed(model.params, inputs)
        edit_inputs = network_inputs(state.network, batch)
        memory = encode_edit(
            state.network, edit_inputs, batch.logit_positions, scored_mask(batch.labels)
        )
        keys = classify_scope(state.network, config.num_heads, edit_inputs)
        answers = _answer_outputs(model, state.unembedding_map, batch)
    return EditSlots(keys, *memory, answers)


def _answer_outputs(model: Model, unembedding: Tensor, batch: Batch) -> Tensor:
    """[B A D] residual streams that the head reads as each row's answer tokens, 0 after."""
    is_scored = scored_mask(batch.labels)
    gold = torch.where(is_scored, batch.labels, 0)[..., None]
    zero = batch.hidden_states.new_zeros(*batch.labels.shape, model.card.hidden_size)

    def answer_margin(hidden_states: Tensor) -> Tensor:
        logits = logits_from_states(model, model.params, hidden_states, batch.edit_index).float()
        return (logits.gather(-1, gold)[..., 0] - logits.mean(-1)).sum()

    outputs = torch.func.grad(answer_margin)(zero).float() @ unembedding
    rms = outputs.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    return outputs / rms * is_scored[..., None]


def _slot_of_same_question(
    record: EditRecord, edit_slots: Sequence[int], edits: Sequence[EditRecord]
) -> int | None:
    """The slot of an edit of the same question about the same images, if there is one."""
    for slot, earlier in zip(edit_slots, edits):
        if slot >= 0 and earlier.prompt == record.prompt and earlier.images == record.images:
            return slot
    return None


def _make_delta(
    model: Model,
    config: SeracConfig,
    state: SeracState,
    slots: EditSlots,
    queries: Sequence[Query],
    earlier: tuple[EditRecord, ...] = (),
    stack: int = 0,
    shared_slots: tuple[int, ...] = (),
    replaced_edits: Sequence[Sequence[int]] = (),
) -> Delta:
    name, weight = _embedding_name(model)
    entry = Scope(
        name=name,
        checkpoint_name=model.card.checkpoint_name(name),
        shape=tuple(weight.shape),
        sizes=_network_sizes(model, config),
        num_slots=slots.keys.shape[-2],
        max_answer_tokens=slots.answer_states.shape[-2],
        max_prompt_tokens=slots.prompt_states.shape[-2],
        edit_slots=state.edit_slots,
        shared_slots=shared_slots,
        gate=config.gate,
        threshold=config.threshold,
    )
    settings = msgspec.structs.replace(
        config, weights=Path(config.weights).name
    )  # no one's folders
    header = make_header(
        model,
        "serac",
        settings,
        (entry,),
        queries,
        earlier_edits=earlier,
        stack=stack,
        replaced_edits=replaced_edits,
    )
    tensors = {**slots._asdict(), **network_state_dict(state.network)}
    return Delta(header, {f"{name}.{part}": tensor.detach() for part, tensor in tensors.items()})
