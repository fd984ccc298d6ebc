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
from errata.functional.stacks import per_edit

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
    stacked = {name: t.expand(len(queries), *t.shape) for name, t in start.items()}
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

    def losses(tensors: Tensors) -> Tensor:
        bound = bind(model, Delta(header, express(tensors)), check=False)
        logits = bound.decode(bound.params, batch, at=_positions(batch.at, rule.objective))
        return per_edit(nll(logits, batch.labels), batch.edit, header.stack)

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
    """Descend from `start` [E ...]; an edit whose loss is at most `stop_loss` stays as it is.

    The optimiser overwrites tensors made here, so that a step is one pass over memory.
    """

    def total(tensors: Tensors):
        each = losses(tensors)
        return each.sum(), each.detach()

    step = torch.func.grad(total, has_aux=True)
    make = {"adamw": optim.adamw, "adam": optim.adam, "sgd": optim.sgd}[rule.optimizer]
    rate = optim.exponential(rule.lr, rule.gamma)
    optimizer = make(rate, weight_decay=rule.weight_decay, donate=True)
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in start.items()}
    memory = optimizer.init(tensors, num_edits=next(iter(tensors.values())).shape[0])
    for _ in range(rule.num_steps):
        grads, each = step(tensors)
        active = each > rule.stop_loss  # [E]
        if not bool(active.any()):
            break
        tensors, memory = optimizer.update(grads, memory, tensors, mask=active, anchor=anchor)
        if rule.clamp is not None:
            tensors = optim.clamp(tensors, rule.clamp, donate=True)
    return tensors
