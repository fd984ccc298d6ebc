"""The expert pool: append, replace, pad; the editor's state."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from errata.editors.liveedit.config import LiveEditConfig
from errata.editors.liveedit.losses import routing_scores
from errata.editors.liveedit.networks import ExpertPool, LiveEditNetworks, fold_queries
from errata.functional import Batch, EditRecord
from errata.functional.kinds.experts.apply import routing_features, token_roles

__all__ = ["ExpertBuffer", "LiveEditState", "append_experts", "new_buffer"]


class ExpertBuffer(NamedTuple):
    """Memory of a growing pool, shared by the states of one sequence of edits.

    A state owns the first rows. Later rows are free until an append takes them, and taken rows are
    never written again, so earlier states stay valid. Of two states that continue the same earlier
    one, the first takes the free rows and the second gets a buffer of its own.

    Attributes:
        experts: Rows [C ...] of every part of the pool, C the capacity.
        num_taken: [] int64, rows taken by any state. The only value that is written in place.
    """

    experts: ExpertPool
    num_taken: Tensor


class LiveEditState(NamedTuple):
    """State of LiveEdit.

    Attributes:
        networks: The trained networks.
        buffer: Memory of the expert pool.
        num_experts: Rows of the buffer that belong to this state.
        edits: The edits so far.
        edit_slots: The expert of each edit. -1 where a later edit replaced it.
        is_trained: Whether the networks are trained.
    """

    networks: LiveEditNetworks
    buffer: ExpertBuffer
    num_experts: int = 0
    edits: tuple[EditRecord, ...] = ()
    edit_slots: tuple[int, ...] = ()
    is_trained: bool = False

    @property
    def pool(self) -> ExpertPool:
        """The experts of this state [N ...]."""
        return ExpertPool(*(rows[: self.num_experts] for rows in self.buffer.experts))


def new_buffer(pool: ExpertPool, capacity: int = 0) -> ExpertBuffer:
    """Copy a pool into a buffer.

    Args:
        pool: The experts [N ...].
        capacity: Rows of the buffer, at least N.

    Returns:
        The buffer, its first N rows taken.
    """
    num_experts = len(pool.down)
    capacity = max(capacity, num_experts)
    experts = []
    for rows in pool:
        storage = rows.new_zeros(capacity, *rows.shape[1:])
        storage[:num_experts] = rows
        experts.append(storage)
    return ExpertBuffer(
        ExpertPool(*experts), torch.tensor(num_experts, dtype=torch.int64, device="cpu")
    )


def append_experts(buffer: ExpertBuffer, num_experts: int, new_experts: ExpertPool) -> ExpertBuffer:
    """Add experts after the first rows of a buffer, at the cost of the new ones on average.

    Args:
        buffer: The buffer.
        num_experts: Rows that belong to the state that appends.
        new_experts: The experts to add [n ...].

    Returns:
        The same buffer if its next rows are free. Otherwise one of twice the size.
    """
    end = num_experts + len(new_experts.down)
    with _APPEND_LOCK:
        is_free = int(buffer.num_taken) == num_experts and len(buffer.experts.down) >= end
        if not is_free:
            pool = ExpertPool(*(rows[:num_experts] for rows in buffer.experts))
            buffer = new_buffer(pool, max(8, 2 * end))
        buffer.num_taken.fill_(end)
    for rows, new_rows in zip(buffer.experts, new_experts, strict=True):
        rows[num_experts:end] = new_rows
    return buffer


def _raise_self_margin(
    networks: LiveEditNetworks,
    config: LiveEditConfig,
    pool: ExpertPool,
    hidden_states: Tensor,
    batch: Batch,
) -> ExpertPool:
    """The pool with vision keys made longer where their own question is not `sure` to pass.

    E' = E * clamp((t + sure) / <f, E>, 1, 4), for an own similarity above 0: the gate's own terms.
    """
    sentinels = (networks.sentinel, networks.sentinel_text)
    extractor = fold_queries(networks.query_features, config.num_heads)
    scores = routing_scores(
        config,
        routing_features(extractor, hidden_states, token_roles(batch), config.num_heads, sentinels),
        pool,
    )
    self_scores = scores.vision.diagonal()  # [E]
    factors = ((scores.sentinel + config.min_self_margin) / self_scores.clamp_min(1e-6)).clamp(1, 4)
    factors = torch.where(self_scores > 0, factors, 1)[:, None]
    keys = torch.cat([pool.vision_keys[:, :-2] * factors, pool.vision_keys[:, -2:]], 1)
    return pool._replace(vision_keys=keys)


def _add_edit(state: LiveEditState, record: EditRecord, new_expert: ExpertPool) -> LiveEditState:
    """The state with one more edit: a new expert, or one in place of the same question's."""
    question = (record.prompt, record.images)
    earlier_slots = [
        owner
        for edit, owner in zip(state.edits, state.edit_slots)
        if owner >= 0 and (edit.prompt, edit.images) == question
    ]
    edits = (*state.edits, record)
    if not earlier_slots:
        return state._replace(
            buffer=append_experts(state.buffer, state.num_experts, new_expert),
            num_experts=state.num_experts + 1,
            edits=edits,
            edit_slots=(*state.edit_slots, state.num_experts),
        )
    slot = earlier_slots[0]
    index = torch.tensor([slot], device=new_expert.down.device, dtype=torch.int64)
    pool = ExpertPool(*(old.index_copy(0, index, new) for old, new in zip(state.pool, new_expert)))
    edit_slots = tuple(-1 if owner == slot else owner for owner in state.edit_slots)
    return state._replace(buffer=new_buffer(pool), edits=edits, edit_slots=(*edit_slots, slot))


_APPEND_LOCK = threading.Lock()  # two threads must not take the same rows


def _pad_pool(pool: ExpertPool, length: int) -> ExpertPool:
    """The pool with no-op experts appended: their modality columns exclude every row."""
    num_padding = length - len(pool.down)
    if not num_padding:
        return pool
    parts = [torch.cat([part, part.new_zeros(num_padding, *part.shape[1:])]) for part in pool]
    parts[0][-num_padding:, -2:] = 1.0
    return ExpertPool(*parts)
