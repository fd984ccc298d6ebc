"""Gradient descent on a delta, many edits side by side, from a prefix computed once.

FT and LoRA (and, later, the values of GRACE and WISE) differ in which tensors they train; how they
train them is here. Legend: E edits · B rows · T scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from errata.functional import (
    Batch,
    Delta,
    EditRecord,
    Header,
    Inputs,
    Model,
    Params,
    Query,
    optim,
    prefix,
)
from errata.functional.bind import bind
from errata.functional.losses import nll

__all__ = ["Objective", "Rule", "Trained", "descend_each", "descend_jointly"]

Objective = Literal["target", "last"]

Tensors = Mapping[str, Tensor]
Describe = Callable[[Sequence[Query], int], Header]
Express = Callable[[Tensors], Tensors]


class Trained(NamedTuple):
    """State of a descending editor: where the next edit starts, and the edits so far."""

    tensors: dict[str, Tensor]
    edits: tuple[EditRecord, ...] = ()


class Rule(NamedTuple):
    """How to descend: the settings that gradient-based editors share."""

    optimizer: Literal["adamw", "adam", "sgd"]
    lr: float
    num_steps: int
    weight_decay: float = 0.0
    gamma: float = 1.0  # the learning rate of step t is lr * gamma**t
    stop_loss: float = 0.0
    clamp: float | None = None
    objective: Objective = "target"


def descend_each(
    model: Model,
    describe: Describe,
    start: Tensors,
    queries: Sequence[Query],
    rule: Rule,
    *,
    express: Express = dict,
    anchor: Params | None = None,
) -> dict[str, Tensor]:
    """Train one independent delta per query, side by side: tensors with a leading edit axis.

    `describe(queries, stack)` gives the header of the delta; `express` turns what is trained into
    the tensors of the delta; `anchor` holds the parameters that weight decay pulls to zero together
    with their change (AdamW acts on W + d, not on d).
    """
    header = describe(queries, len(queries))
    reach = prefix.reach(model.card, [entry.name for entry in header.entries])
    if reach.embed:
        # Changes below the decoder act on pixels, where rows of one image have no edit axis.
        alone = [
            descend_jointly(model, describe, start, [query], rule, express=express, anchor=anchor)
            for query in queries
        ]
        return {name: torch.stack([tensors[name] for tensors in alone]) for name in start}
    stacked = {name: tensor.expand(len(queries), *tensor.shape) for name, tensor in start.items()}
    batch = prefix.cut(model, model.read(queries), reach)
    batch = batch._replace(edit=torch.arange(len(queries), device=batch.edit.device))
    loss = _stacked_loss(model, header, batch, rule, express)
    return _descend(loss, stacked, rule, anchor)


def descend_jointly(
    model: Model,
    describe: Describe,
    start: Tensors,
    queries: Sequence[Query],
    rule: Rule,
    *,
    express: Express = dict,
    anchor: Params | None = None,
) -> dict[str, Tensor]:
    """Train one delta on all queries at once: the loss is the mean over queries."""
    inputs = model.read(queries)
    header = describe(queries[:1], 1)
    reach = prefix.reach(model.card, [entry.name for entry in header.entries])
    if reach.embed:
        loss = _embed_loss(model, describe(queries, 0), inputs, rule, express)
    else:
        batch = prefix.cut(model, inputs, reach)
        batch = batch._replace(edit=torch.zeros_like(batch.edit))
        loss = _stacked_loss(model, header, batch, rule, express)
    alone = {name: tensor[None] for name, tensor in start.items()}
    return {name: tensor[0] for name, tensor in _descend(loss, alone, rule, anchor).items()}


def _stacked_loss(model: Model, header: Header, batch: Batch, rule: Rule, express: Express):
    """losses(tensors) [E]: rows of the batch run under the edit they name."""
    num_edits = header.stack
    rows = torch.zeros(num_edits, device=batch.edit.device).index_add(
        0, batch.edit, torch.ones(batch.rows, device=batch.edit.device)
    )

    def losses(tensors: Tensors) -> Tensor:
        bound = bind(model, Delta(header, express(tensors)), check=False)
        logits = bound.decode(bound.params, batch, at=_positions(batch.at, rule.objective))
        row = nll(logits, batch.labels)  # [B]
        return row.new_zeros(num_edits).index_add(0, batch.edit, row) / rows

    return losses


def _embed_loss(model: Model, header: Header, inputs: Inputs, rule: Rule, express: Express):
    """losses(tensors) [1] for changes below the decoder: the vision path runs in every step."""

    def losses(tensors: Tensors) -> Tensor:
        alone = express({name: tensor[0] for name, tensor in tensors.items()})
        bound = bind(model, Delta(header, alone), check=False)
        batch = bound.embed(bound.params, inputs)
        logits = bound.decode(bound.params, batch, at=_positions(batch.at, rule.objective))
        return nll(logits, batch.labels).mean()[None]

    return losses


def _positions(at: Tensor, objective: Objective) -> Tensor:
    """FT-L reads every target token off the last prompt position, FT-M off its own."""
    return at[:, :1].expand_as(at) if objective == "last" else at


def _descend(losses, start: Tensors, rule: Rule, anchor: Params | None) -> dict[str, Tensor]:
    """Descend from `start`; an edit whose loss is at most `stop_loss` stays where it is."""

    def total(tensors: Tensors):
        each = losses(tensors)
        return each.sum(), each.detach()

    step = torch.func.grad(total, has_aux=True)
    make = {"adamw": optim.adam, "adam": optim.adam, "sgd": optim.sgd}[rule.optimizer]
    optimizer = make(lr=rule.lr)
    tensors = {name: tensor.float().clone() for name, tensor in start.items()}
    memory = optimizer.init(tensors)
    for number in range(rule.num_steps):
        grads, each = step(tensors)
        active = each > rule.stop_loss  # [E]
        if not bool(active.any()):
            break
        scale = rule.gamma**number
        if rule.weight_decay:
            grads, tensors = _decay(grads, tensors, anchor or {}, rule, scale, active)
        tensors, memory = optimizer.update(grads, memory, tensors, mask=active, scale=scale)
        if rule.clamp is not None:
            tensors = {n: t.clamp(-rule.clamp, rule.clamp) for n, t in tensors.items()}
    return tensors


def _decay(grads, tensors, anchor: Params, rule: Rule, scale: float, active: Tensor):
    """Weight decay on W + d: decoupled for AdamW, in the gradient for Adam and SGD."""

    def whole(name: str) -> Tensor:
        return tensors[name] + anchor[name].float() if name in anchor else tensors[name]

    if rule.optimizer != "adamw":
        return {n: g + rule.weight_decay * whole(n) for n, g in grads.items()}, tensors
    rate = rule.lr * scale * rule.weight_decay * active.float()
    shaped = {n: rate.view(-1, *[1] * (t.ndim - 1)) for n, t in tensors.items()}
    return grads, {n: t - shaped[n] * whole(n) for n, t in tensors.items()}
