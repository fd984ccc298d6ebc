"""WISE: side memories of one linear map, with a gate that only the prompts of edits open.

A memory is a sparse change D of the map's weight W, zero outside a random mask. A row runs with
W + D if its prompt's activation

    a(x) = mean over the prompt's tokens of |phi((W + D) x_t) - phi(W x_t)|_2

reaches a threshold, and with W otherwise. An edit trains the values of D under the mask,

    L = mean_j -log p(x*_j | image, prompt, x*_<j ; W + D)  +  m(a(edit), a(unrelated))
    m(a, b) = [b - alpha]_+ + [beta - a]_+ + [b - a + gamma]_+

and the threshold is `act_ratio` times a(edit) after training. Sequential edits share a memory.
After `save_freq` edits a new memory begins with a new mask. Full memories are merged into one when
they hold `merge_freq` edits (`merging.py`).

Sources: Wang et al. 2024 (arXiv 2405.14768); EasyEdit `models/wise/WISE.py`. Differences from it:

* Editing and inference gate by the same statistic: over the prompt's own tokens, without padding
  and answer. EasyEdit takes the mean over all tokens in editing, and at inference the maximum for
  rows over 100 tokens (`gate_statistic="easyedit"`).
* The gate is trained on packaged prompts or your own (`unrelated_texts`, `unrelated_questions`,
  `unrelated_queries`), never on the question that measures locality. Questions about the edit's
  image, and the edit's question without its image, can be added (`own_negatives`).
* Weight decay acts under the mask only; EasyEdit's moves all of W. The map keeps its bias. A mask
  has its ratio exactly and follows from the edit's id. Inference merges nothing. The loss is a mean
  over the answer; EasyEdit's also counts one prompt token, as zero.
* Earlier edits of a memory can be trained again with a new one (`num_replayed`), answers and gate
  both. If all of them are replayed, the memory is trained from zero, so sequential edits are as
  good as a batch edit.
* An edit replaces an earlier one of the same question about the same images. A memory that holds
  only the earlier edit is dropped, and the earlier edit is not replayed. In EasyEdit both stay. A
  full memory keeps an edit that it shares with others.

Cost of an edit: its rows and the unrelated prompts run once up to the site. Then `num_steps`
forward and backward passes of its own rows from the site's layer on (`training.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errata.editors.common.guards import guarded
from errata.editors.wise.config import WiseConfig
from errata.editors.wise.merging import merge_changes
from errata.editors.wise.objective import EditSite, PreparedRows, take_prepared
from errata.editors.wise.training import (
    concat_rows,
    edit_generator,
    last_rows,
    prepare_rows,
    resolve_edit_site,
    sample_mask,
    train_values,
)
from errata.functional import Delta, Editor, EditRecord, Header, Model, Query
from errata.functional.deltas.records import edit_record, make_header
from errata.functional.errors import InvalidInputError
from errata.functional.kinds.masked.bitmask import pack_bits, scatter_values, unpack_bits
from errata.functional.kinds.schema import Masked

__all__ = ["ActiveShard", "SideMemory", "WiseState", "wise_editor"]


class SideMemory(NamedTuple):
    """A side memory: values at the set bits of a mask of the map.

    Attributes:
        mask: Bits of the flat map [ceil(O I / 8)] uint8, as `pack_bits` makes them.
        values: Values at the set bits [K].
        min_activation: The smallest activation of its edits [].
        edit_numbers: Numbers of its edits in the sequence.
    """

    mask: Tensor
    values: Tensor
    min_activation: Tensor
    edit_numbers: tuple[int, ...] = ()


class ActiveShard(NamedTuple):
    """The memory that new edits train.

    Attributes:
        memory: The memory.
        num_free: Edits that it can still take.
        replay_rows: Rows of its last `num_replayed` edits.
    """

    memory: SideMemory
    num_free: int
    replay_rows: PreparedRows | None = None


class WiseState(NamedTuple):
    """State of WISE.

    Attributes:
        seed: Seed of masks, unrelated prompts and merges.
        full_memories: Memories that take no more edits, merged ones first.
        num_merged: Number of the full memories that are results of a merge.
        shard: The memory that new edits train. None: the next edit begins one.
        edits: The edits so far.
    """

    seed: int
    full_memories: tuple[SideMemory, ...] = ()
    num_merged: int = 0
    shard: ActiveShard | None = None
    edits: tuple[EditRecord, ...] = ()

    @property
    def memories(self) -> tuple[SideMemory, ...]:
        """All memories, the active one last."""
        return (
            self.full_memories if self.shard is None else (*self.full_memories, self.shard.memory)
        )


def wise_editor(
    config: WiseConfig = WiseConfig(), unrelated_queries: Sequence[Query] = ()
) -> Editor:
    """WISE as an editor: a `masked` entry, sparse side memories of one linear map.

    The state holds the memories. Each edit trains the active one under a mask. Full memories are
    merged after `merge_freq` edits.

    Args:
        config: The settings.
        unrelated_queries: Unrelated prompts with images. By default those of the settings.

    Returns:
        The editor.

    Raises:
        UnknownSiteError: If the site is not in the model.
        InvalidSettingsError: If the layer or the activation cannot be.

    References:
        Wang et al. 2024, "WISE", arXiv:2405.14768. The decay of EasyEdit changes weights outside
        the mask; here it does not.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> editor = wise_editor(WiseConfig(num_steps=2, mask_ratio=0.5))
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
        >>> delta.header.entries[0].num_values, delta.header.entries[0].shape
        ((1024,), (32, 64))
    """
    unrelated_prompts = tuple(query._replace(target="") for query in unrelated_queries)

    def init(model: Model, generator: torch.Generator) -> WiseState:
        resolve_edit_site(model, config)
        return WiseState(
            int(torch.randint(0, 2**62, (), generator=generator, dtype=torch.int64, device="cpu"))
        )

    def edit(model: Model, state: WiseState, queries: Sequence[Query]) -> tuple[Delta, WiseState]:
        queries = list(queries)
        while queries:
            num_free = config.save_freq if state.shard is None else state.shard.num_free
            state = _train_shard(model, state, queries[:num_free], config, unrelated_prompts)
            queries = queries[num_free:]
        slot_by_edit = {
            k: number for number, side in enumerate(state.memories) for k in side.edit_numbers
        }
        edit_slots = tuple(slot_by_edit.get(k, -1) for k in range(len(state.edits)))
        header = _make_header(model, config, (), state.memories, edit_slots, earlier=state.edits)
        return _make_delta(header, [state.memories], config), state

    def edit_each(model: Model, state: WiseState, queries: Sequence[Query]) -> Delta:
        if state.edits:
            raise InvalidInputError(
                f"edits side by side must start from a fresh state, and this one holds "
                f"{len(state.edits)}: take `editor.init(model, generator)`, or `editor.edit`."
            )
        site, records = resolve_edit_site(model, config), tuple(map(edit_record, queries))
        memories = [_init_memory(model, site, state.seed, one, config) for one in records]
        prepared = prepare_rows(
            model, site, queries, records, state.seed, config, unrelated_prompts
        )
        positions = torch.stack([_mask_positions(side, site) for side in memories])
        initial_values = torch.stack([side.values for side in memories])
        values, min_activations = train_values(
            model, site, prepared, positions, initial_values, config
        )
        memories = [
            side._replace(values=v, min_activation=a)
            for side, v, a in zip(memories, values, min_activations)
        ]
        edit_slots, count = (0,) * len(memories), len(memories)
        header = _make_header(model, config, queries, memories[:1], edit_slots, stack=count)
        return _make_delta(header, [[side] for side in memories], config)

    return guarded(Editor("wise", config, init, edit, edit_each))


def _train_shard(
    model: Model,
    state: WiseState,
    queries: Sequence[Query],
    config: WiseConfig,
    unrelated_queries: Sequence[Query],
) -> WiseState:
    """Train the current memory on some more edits. A full memory is closed and may be merged."""
    site, all_records = resolve_edit_site(model, config), tuple(map(edit_record, queries))
    state = _drop_outdated(state, all_records)
    last_by_question = {
        (one.prompt, one.images): k for k, one in enumerate(all_records)
    }  # the last of a question
    records = tuple(all_records[k] for k in last_by_question.values())
    edit_queries = [queries[k] for k in last_by_question.values()]
    shard = state.shard or ActiveShard(
        _init_memory(model, site, state.seed, records[0], config), config.save_freq
    )
    prepared = prepare_rows(
        model, site, edit_queries, records, state.seed, config, unrelated_queries
    )
    prepared = concat_rows(shard.replay_rows, prepared)
    prepared = prepared._replace(
        batch=prepared.batch._replace(edit_index=torch.zeros_like(prepared.batch.edit_index))
    )
    positions = _mask_positions(shard.memory, site)[None]
    # If all its edits are replayed, train from zero: the result is that of a batch edit.
    num_unseen = len(shard.memory.edit_numbers) + len(edit_queries) - len(prepared.inputs)
    initial_values = shard.memory.values if num_unseen else torch.zeros_like(shard.memory.values)
    values, min_activations = train_values(
        model, site, prepared, positions, initial_values[None], config
    )
    edit_numbers = [len(state.edits) + k for k in last_by_question.values()]
    memory = shard.memory._replace(
        values=values[0],
        min_activation=torch.minimum(shard.memory.min_activation, min_activations[0])
        if num_unseen
        else min_activations[0],
        edit_numbers=(*shard.memory.edit_numbers, *edit_numbers),
    )
    shard = ActiveShard(
        memory, shard.num_free - len(queries), last_rows(prepared, config.num_replayed)
    )
    state = state._replace(edits=state.edits + all_records, shard=shard)
    if shard.num_free:
        return state
    state = state._replace(full_memories=(*state.full_memories, memory), shard=None)
    return _merge_memories(site, state, config)


def _drop_outdated(state: WiseState, records: Sequence[EditRecord]) -> WiseState:
    """Drop earlier edits of the same questions about the same images, as far as possible."""
    questions = {(one.prompt, one.images) for one in records}
    outdated = {k for k, one in enumerate(state.edits) if (one.prompt, one.images) in questions}
    remaining = [
        n
        for n, side in enumerate(state.full_memories)
        if not outdated.issuperset(side.edit_numbers)
    ]
    shard = state.shard
    if shard is not None and not outdated.isdisjoint(shard.memory.edit_numbers):
        edit_numbers = shard.memory.edit_numbers
        remaining_edits, replay_rows = (
            tuple(k for k in edit_numbers if k not in outdated),
            shard.replay_rows,
        )
        if replay_rows is not None:  # the rows are those of the last edits
            row_edits = edit_numbers[len(edit_numbers) - len(replay_rows.inputs) :]
            row_indices = [row for row, k in enumerate(row_edits) if k not in outdated]
            replay_rows = (
                take_prepared(
                    replay_rows, torch.tensor(row_indices, dtype=torch.int64, device="cpu")
                )
                if row_indices
                else None
            )
        shard = shard._replace(
            memory=shard.memory._replace(edit_numbers=remaining_edits), replay_rows=replay_rows
        )
    return state._replace(
        full_memories=tuple(state.full_memories[n] for n in remaining),
        num_merged=sum(n < state.num_merged for n in remaining),
        shard=shard if shard is not None and shard.memory.edit_numbers else None,
    )


def _make_header(
    model: Model,
    config: WiseConfig,
    queries: Sequence[Query],
    memories: Sequence[SideMemory],
    edit_slots: tuple[int, ...],
    *,
    earlier: tuple[EditRecord, ...] = (),
    stack: int = 0,
) -> Header:
    site = resolve_edit_site(model, config)
    entry = Masked(
        name=site.weight,
        checkpoint_name=model.card.checkpoint_name(site.weight),
        shape=tuple(model.params[site.weight].shape),
        num_values=tuple(len(side.values) for side in memories),
        edit_slots=edit_slots,
        activation=site.activation,
        gate_statistic=config.gate_statistic,
        transposed=site.transposed,
    )
    return make_header(model, "wise", config, (entry,), queries, earlier_edits=earlier, stack=stack)


def _init_memory(
    model: Model, site: EditSite, seed: int, record: EditRecord, config: WiseConfig
) -> SideMemory:
    """Make an empty memory. Its mask is seeded by the id of its first edit."""
    device = model.params[site.weight].device
    mask = sample_mask(site.size, config.mask_ratio, edit_generator(seed, record, "mask"))
    return SideMemory(
        pack_bits(mask).to(device),
        torch.zeros(int(mask.sum()), device=device, dtype=torch.float32),
        torch.tensor(torch.inf, device=device, dtype=torch.float32),
    )


def _mask_positions(memory: SideMemory, site: EditSite) -> Tensor:
    """List the positions of the values in the flat map [K] int64, ascending."""
    return unpack_bits(memory.mask, site.size[0] * site.size[1]).nonzero()[:, 0]


def _merge_memories(site: EditSite, state: WiseState, config: WiseConfig) -> WiseState:
    """Merge the unmerged full memories, once they hold `merge_freq` edits."""
    unmerged = state.full_memories[state.num_merged :]
    if sum(len(side.edit_numbers) for side in unmerged) < config.merge_freq:
        return state
    merged, weights = state.full_memories[: state.num_merged], [1.0 / len(unmerged)] * len(unmerged)
    if config.mode == "merge" and merged:
        unmerged = (*unmerged, *merged)  # as in EasyEdit, the earlier merge has weight 0.6
        weights = [0.4 * weight for weight in weights] + [0.6]
        merged = ()
    changes = torch.stack(
        [scatter_values(side.mask, side.values, site.size).flatten() for side in unmerged]
    )
    generator = edit_generator(state.seed, state.edits[unmerged[0].edit_numbers[0]], "merge")
    total = merge_changes(changes, weights, config.merge_alg, config.density, generator)
    mask = unpack_bits(torch.stack([side.mask for side in unmerged]), len(total)).any(0)
    memory = SideMemory(
        pack_bits(mask),
        total[mask],
        torch.stack([side.min_activation for side in unmerged]).min(),
        tuple(sorted(k for side in unmerged for k in side.edit_numbers)),
    )
    return state._replace(full_memories=(*merged, memory), num_merged=len(merged) + 1)


def _make_delta(
    header: Header, memories_per_edit: Sequence[Sequence[SideMemory]], config: WiseConfig
) -> Delta:
    """Make a delta from the memories of one edit sequence, or a stack from those of several."""
    tensors: dict[str, list[Tensor]] = {"mask": [], "values": [], "thresholds": []}
    for memories in memories_per_edit:
        tensors["mask"].append(torch.stack([side.mask for side in memories]))
        tensors["values"].append(torch.cat([side.values for side in memories]))
        min_activations = torch.stack([side.min_activation for side in memories])
        tensors["thresholds"].append(config.act_ratio * min_activations)
    stacked = {part: torch.stack(found) for part, found in tensors.items()}
    name = header.entries[0].name
    return Delta(header, {f"{name}.{p}": x if header.stack else x[0] for p, x in stacked.items()})
