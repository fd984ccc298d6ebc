"""The expert pool: append, replace, pad; the editor state."""

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

__all__ = ["LiveEditState"]


class LiveEditState(NamedTuple):
    """State of LiveEdit: the trained networks, and the edits so far."""

    networks: LiveEditNetworks
    pool: ExpertPool
    edits: tuple[EditRecord, ...] = ()
    edit_slots: tuple[int, ...] = ()  # the expert of each edit, -1 where it was taken over


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
        with _APPEND_LOCK:
            pool = ExpertPool(*(append_rows(*pair) for pair in zip(state.pool, new_expert)))
        return state._replace(
            pool=pool, edits=edits, edit_slots=(*state.edit_slots, len(state.pool.down))
        )
    slot = earlier_slots[0]
    index = torch.tensor([slot], device=new_expert.down.device)
    pool = ExpertPool(*(old.index_copy(0, index, new) for old, new in zip(state.pool, new_expert)))
    edit_slots = tuple(-1 if owner == slot else owner for owner in state.edit_slots)
    return state._replace(pool=pool, edits=edits, edit_slots=(*edit_slots, slot))


def append_rows(rows: Tensor, new_rows: Tensor) -> Tensor:
    """old [N ...] and fresh [n ...] one after another, at the cost of `fresh` alone, on average.

    Tensors are the first rows of a roomy one whose rows are NaN until they are taken; nobody who
    holds fewer rows sees the later ones. Rows that another sequence of edits took are left to it:
    then, and where there is no room, everything moves to one of twice the size.

    >>> append_rows(torch.zeros(2, 1), torch.ones(1, 1)).T
    tensor([[0., 0., 1.]])
    """
    begin, end = len(rows), len(rows) + len(new_rows)
    storage = rows._base
    is_free = (
        storage is not None
        and storage.shape[1:] == rows.shape[1:]
        and storage.data_ptr() == rows.data_ptr()
        and len(storage) >= end
        and bool(storage[begin:end].isnan().all())
    )
    if storage is None or not is_free:
        storage = rows.new_full((max(8, 2 * end), *rows.shape[1:]), torch.nan)
        storage[:begin] = rows
    storage[begin:end] = new_rows
    return storage[:end]


_APPEND_LOCK = threading.Lock()  # between looking for room and taking it


def _pad_pool(pool: ExpertPool, length: int) -> ExpertPool:
    """The pool with experts for nothing behind it: their columns of kinds keep out every row."""
    num_padding = length - len(pool.down)
    if not num_padding:
        return pool
    parts = [torch.cat([part, part.new_zeros(num_padding, *part.shape[1:])]) for part in pool]
    parts[0][-num_padding:, -2:] = 1.0
    return ExpertPool(*parts)
