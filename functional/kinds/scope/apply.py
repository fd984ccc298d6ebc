"""A `scope` entry bound to a model: questions are classified, then answered by base or edit.

    s = max_n exp(-|e(n) - e(question)|^2),   n the most similar edit in memory
    hard   log p = log c(. | n) if s > threshold, else log f       (f: bit for bit the base)
    soft   log p = log( (1 - s) softmax f + s softmax c )

f are the base's logits. c are logits of the base's final norm and head, applied to what the small
network computes from edit n and the question. Both act from the prompt's last token on, so
generation token by token equals one pass. The classification depends on the prompt alone and is
kept in `Batch.routing`, with the projected question, for the tokens that follow.

After SERAC: Mitchell et al. 2022, https://arxiv.org/abs/2206.06520; EasyEdit's `SERAC_MULTI`, whose
classifier reads the answer that is being scored and no image, and whose counterfactual model sees
images through a random matrix. Legend: B rows · L tokens · T positions · D, d widths · N slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional.errors import InvalidInputError, ShapeError
from errata.functional.header import Header
from errata.functional.kinds.common.patch import Patch
from errata.functional.kinds.scope.entry import Scope
from errata.functional.kinds.scope.network import (
    EditMemory,
    NetworkInputs,
    ScopeNetwork,
    classify_scope,
    counterfactual_states,
    load_network,
    network_inputs,
    read_answer,
)
from errata.functional.types import IGNORE_INDEX, Batch, Hooks, KVCache, Model, Params
from errata.kernels import codebook as kernel

__all__ = ["apply_scope", "logits_from_states", "mix_logits"]


class _BoundScope(NamedTuple):
    """An entry's tensors, ready to be asked."""

    entry: Scope
    num_deltas_below: int  # of deltas below
    network: ScopeNetwork
    keys: Tensor  # [N K], or [E N K] of a stacked delta
    norms: Tensor | None
    memory: EditMemory
    answers: Tensor
    stacked: bool

    def routing_name(self, suffix: str) -> str:
        """The name of a note or an extra of this entry's own.

        Deltas lie one on another, and rows side by side run under deltas of other sizes.
        """
        sizes = f"{self.entry.sizes.dim}.{self.entry.max_answer_tokens}"
        return f"{self.entry.name}.scope.{self.num_deltas_below}.{sizes}.{suffix}"

    def slots_of(self, tensor: Tensor, index: Tensor, edit_index: Tensor) -> Tensor:
        """Each row's slot of a tensor that has one per edit in memory."""
        return tensor[edit_index.clamp_min(0), index] if self.stacked else tensor[index]


def apply_scope(model: Model, header: Header, entry: Scope, tensors: Mapping[str, Tensor]) -> Patch:
    """Build the patch of a scope classifier, a counterfactual model and their memory.

    Args:
        model: Model to bind to.
        header: Header of the delta.
        entry: Entry of the delta.
        tensors: Tensors of the delta.

    Returns:
        A patch of decoding.

    Raises:
        ShapeError: If the network is for a model of another width.
    """
    if entry.sizes.hidden_size != model.card.hidden_size:
        raise ShapeError(
            f"{entry.name}: the network must read rows as wide as the model's, "
            f"{model.card.hidden_size}; "
            f"its own are {entry.sizes.hidden_size}."
        )
    by_part = {name.removeprefix(f"{entry.name}."): t.float() for name, t in tensors.items()}
    stacked = bool(header.stack)
    bound_scope = _BoundScope(
        entry,
        len(model.deltas),
        load_network(by_part),
        by_part["keys"],
        None if stacked else kernel.square_norms(by_part["keys"]),
        EditMemory(by_part["answer_states"], by_part["image_states"], by_part["prompt_states"]),
        by_part["answer_outputs"],
        stacked,
    )
    return Patch(wrap=partial(_wrap_model, bound_scope))


def logits_from_states(
    model: Model,
    params: Params,
    hidden_states: Tensor,
    edit_index: Tensor,
    hooks: Hooks | None = None,
) -> Tensor:
    """Logits of residual streams after the last layer: final norm and head.

    Args:
        model: Model, maybe with deltas bound.
        params: Its parameters.
        hidden_states: Residual streams, [B T D].
        edit_index: The edit of a stacked delta, bound before, that each row runs under, [B].
        hooks: Hooks on the final norm or head.

    Returns:
        [B T V].
    """
    positions = torch.arange(
        hidden_states.shape[1], device=hidden_states.device, dtype=torch.int64
    ).expand(hidden_states.shape[:2])
    batch = Batch(
        hidden_states=hidden_states,
        attention_mask=torch.ones_like(positions, dtype=torch.bool),
        position_ids=positions[:, None],
        image_mask=torch.zeros_like(positions, dtype=torch.bool),
        prompt_end=torch.zeros_like(positions, dtype=torch.bool),
        labels=torch.full_like(positions, IGNORE_INDEX),
        logit_positions=positions,
        edit_index=edit_index,
        layer_inputs={},
        depth=model.card.num_layers,
    )
    return model.decode(params, batch, hooks or {})


def mix_logits(base: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Mix two predictions: log( (1 - s) softmax f + s softmax c ); f itself where s is 0.

    Without the peers' + eps: both terms stay logarithms.

    >>> f, c = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    >>> mix_logits(f, c, torch.tensor([[0.5]])).exp()
    tensor([[[0.5000, 0.5000]]])

    Args:
        base: Logits f, [B T V].
        other: Logits c, [B T V].
        share: Shares s from 0 to 1, [B T].

    Returns:
        [B T V], fp32.
    """
    tiny = torch.finfo(torch.float32).eps
    s = share.float().clamp(tiny, 1 - tiny)[..., None]
    f, c = base.float().log_softmax(-1), other.float().log_softmax(-1)
    mixture = torch.logaddexp(torch.log1p(-s) + f, s.log() + c)
    return torch.where(share[..., None] > 0, mixture, base.float())


def _wrap_model(bound_scope: _BoundScope, model: Model) -> Model:
    states_name, gate_name, slot_name = (
        bound_scope.routing_name("said@bq_"),
        bound_scope.routing_name("gate@bq"),
        bound_scope.routing_name("slot@b"),
    )
    last = model.card.num_layers

    def require_classified(batch: Batch, what: str) -> None:
        if 0 < batch.depth < last and states_name not in batch.layer_inputs:
            raise InvalidInputError(
                "a delta of kind 'scope' judges a question by the rows it is asked in: hand the "
                f"bound model batches at depth 0, or cut by itself; {what} got one at depth "
                f"{batch.depth} that it has not seen."
            )

    def decode(
        params: Params,
        batch: Batch,
        hooks: Hooks | None = None,
        *,
        stop: int | None = None,
        logit_positions: Tensor | str | None = None,
        kv_cache: KVCache | None = None,
        return_cache: bool = False,
        **options: Any,
    ) -> Any:
        require_classified(batch, "decode")
        if batch.depth == 0 and states_name not in batch.layer_inputs:
            batch = _classify_rows(bound_scope, batch, kv_cache)
        result = model.decode(
            params,
            batch,
            hooks or {},
            stop=stop,
            logit_positions=logit_positions,
            kv_cache=kv_cache,
            return_cache=return_cache,
            **options,
        )
        if stop not in (None, last) or batch.depth == last:
            return result
        logits, new_cache = result if return_cache else (result, None)
        positions = batch.logit_positions if logit_positions is None else logit_positions
        share, states = batch.layer_inputs[gate_name], batch.layer_inputs[states_name]
        if isinstance(positions, Tensor):
            share = share.gather(1, positions)
            states = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
        h, pointer = states.split(
            [bound_scope.entry.sizes.dim, bound_scope.entry.max_answer_tokens], -1
        )
        answers = bound_scope.slots_of(
            bound_scope.answers, batch.layer_inputs[slot_name], batch.edit_index
        )  # [B A D]
        stream = read_answer(bound_scope.network, h, pointer, answers).to(batch.hidden_states.dtype)
        other = logits_from_states(model, params, stream, batch.edit_index, hooks)
        if bound_scope.entry.gate == "soft":
            logits = mix_logits(logits, other, share).to(logits.dtype)
        else:
            logits = torch.where(share[..., None] > bound_scope.entry.threshold, other, logits)
        return (logits, new_cache) if return_cache else logits

    def select_scored(params: Params, batch: Batch, hooks: Hooks | None = None, **options) -> Batch:
        require_classified(batch, "select_scored")
        return model.select_scored(params, batch, hooks or {}, **options)

    def embed_next(
        params: Params,
        input_ids: Tensor,
        kv_cache: KVCache,
        hooks: Hooks | None = None,
        edit_index: Tensor | None = None,
    ) -> Batch:
        batch = model.embed_next(params, input_ids, kv_cache, hooks or {}, edit_index=edit_index)
        # New tokens follow the prompt: its routing holds.
        after_prompt = {bound_scope.routing_name("later"): batch.edit_index}
        return batch._replace(routing={**batch.routing, **after_prompt})

    return model._replace(decode=decode, select_scored=select_scored, embed_next=embed_next)


def _classify_rows(bound_scope: _BoundScope, batch: Batch, kv_cache: KVCache | None) -> Batch:
    """The batch with what its rows' questions are about, and what the edit says to them."""
    num_heads, length = bound_scope.entry.sizes.num_heads, batch.hidden_states.shape[1]
    routing = {**(kv_cache.routing if kv_cache else {}), **batch.routing}
    inputs = network_inputs(bound_scope.network, batch)
    names = [bound_scope.routing_name(field) for field in NetworkInputs._fields]
    all_inputs = NetworkInputs(
        *(torch.cat([routing[n], x], 1) if n in routing else x for n, x in zip(names, inputs))
    )
    if bound_scope.routing_name("later") in batch.routing:
        share, index = (
            routing[bound_scope.routing_name("share")],
            routing[bound_scope.routing_name("slot")],
        )
    else:
        share, index = _nearest_slot(
            bound_scope,
            classify_scope(bound_scope.network, num_heads, all_inputs),
            batch.edit_index,
        )
    memory = EditMemory(
        *(bound_scope.slots_of(part, index, batch.edit_index) for part in bound_scope.memory)
    )
    states, pointer = counterfactual_states(bound_scope.network, num_heads, all_inputs, memory)
    after_prompt = all_inputs.prompt_end.cumsum(1)[:, -length:] > 0  # [B L]
    layer_inputs = {
        bound_scope.routing_name("said@bq_"): torch.cat([states, pointer], -1)[:, -length:],
        bound_scope.routing_name("gate@bq"): share[:, None] * after_prompt,
        bound_scope.routing_name("slot@b"): index,
    }
    new_routing = dict(zip(names, all_inputs)) | {
        bound_scope.routing_name("share"): share,
        bound_scope.routing_name("slot"): index,
    }
    other_routing = {
        name: value for name, value in routing.items() if name != bound_scope.routing_name("later")
    }
    return batch._replace(
        layer_inputs={**batch.layer_inputs, **layer_inputs},
        routing={**other_routing, **new_routing},
    )


def _nearest_slot(
    bound_scope: _BoundScope, key: Tensor, edit_index: Tensor
) -> tuple[Tensor, Tensor]:
    """s [B] and the most similar edit's slot [B], the lowest on ties."""
    if bound_scope.stacked:
        gaps = (bound_scope.keys[edit_index.clamp_min(0)] - key[:, None]).square().sum(-1)  # [B N]
        smallest, index = gaps.min(1)
        return torch.where(edit_index >= 0, torch.exp(-smallest), 0), index
    nearest = kernel.nearest_key(key.detach(), bound_scope.keys, norms=bound_scope.norms)
    share = torch.where(nearest.index >= 0, torch.exp(-nearest.distance.square()), 0)
    return share, nearest.index.clamp_min(0)
