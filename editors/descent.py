"""Gradient descent on a delta, many edits side by side, from a prefix computed once.

FT and LoRA (and, later, the values of GRACE and WISE) differ in which tensors they train; how they
train them is here. Legend: E edits · B rows · T scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

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
from errata.functional.errors import BadInput, BadSettings
from errata.functional.factors import unformed_gradients
from errata.functional.losses import nll
from errata.functional.stacks import per_edit

__all__ = [
    "Objective",
    "Rule",
    "Step",
    "Trained",
    "descend",
    "descend_each",
    "descend_jointly",
]

Objective = Literal["target", "last"]

Tensors = Mapping[str, Tensor]
Describe = Callable[[Sequence[Query], int], Header]
Express = Callable[[Tensors], Tensors]
Step = Callable[[Tensors], tuple[Any, Tensor]]  # tensors -> gradients, losses [E]


class Trained(NamedTuple):
    """State of a descending editor: where the next edit starts, and the edits so far."""

    tensors: dict[str, Tensor]
    edits: tuple[EditRecord, ...] = ()


def fresh(state: Trained) -> Trained:
    """The state, if no edit has been made from it: what edits side by side must start from.

    Raises BadInput otherwise: a stacked delta lists one edit each, and could not tell of earlier.
    """
    if state.edits:
        raise BadInput(
            f"edits side by side must start from a fresh state, and this one holds "
            f"{len(state.edits)}: take `editor.init(model, generator)`, or `editor.edit` to go on."
        )
    return state


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
    end: bool = False  # the target is followed by the token that ends an answer


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
    batch = cast(Batch, prefix.cut(model, _read(model, queries, rule), reach))
    batch = batch._replace(edit=torch.arange(len(queries), device=batch.edit.device))
    step = _stacked_step(model, header, batch, rule, express)
    return descend(step, stacked, rule, anchor)


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
    inputs = _read(model, queries, rule)
    header = describe(queries[:1], 1)
    reach = prefix.reach(model.card, [entry.name for entry in header.entries])
    if reach.embed:
        step = _embed_step(model, describe(queries, 0), inputs, rule, express)
    else:
        batch = cast(Batch, prefix.cut(model, inputs, reach))
        batch = batch._replace(edit=torch.zeros_like(batch.edit))
        step = _stacked_step(model, header, batch, rule, express)
    alone = {name: tensor[None] for name, tensor in start.items()}
    return {name: tensor[0] for name, tensor in descend(step, alone, rule, anchor).items()}


def _read(model: Model, queries: Sequence[Query], rule: Rule) -> Inputs:
    return model.read(queries, end=True) if rule.end else model.read(queries)


def _stacked_step(model: Model, header: Header, batch: Batch, rule: Rule, express: Express) -> Step:
    """Gradients and losses [E] of a stacked delta: rows run under the edit they name."""
    at = _positions(batch.at, rule.objective)

    def loss(logits: Tensor):
        each = per_edit(nll(logits, batch.labels), batch.edit, header.stack)
        return each.sum(), each.detach()

    if express is dict:  # the tensors of the delta themselves: their gradients may stay in factors
        return lambda tensors: unformed_gradients(model, Delta(header, tensors), batch, loss, at=at)

    def total(tensors: Tensors):
        bound = bind(model, Delta(header, express(tensors)), check=False)
        return loss(bound.decode(bound.params, batch, at=at))

    return torch.func.grad(total, has_aux=True)


def _embed_step(model: Model, header: Header, inputs: Inputs, rule: Rule, express: Express) -> Step:
    """The same, one edit, for changes below the decoder: the vision path runs in every step."""

    def total(tensors: Tensors):
        alone = express({name: tensor[0] for name, tensor in tensors.items()})
        bound = bind(model, Delta(header, alone), check=False)
        batch = bound.embed(bound.params, inputs)
        logits = bound.decode(bound.params, batch, at=_positions(batch.at, rule.objective))
        each = nll(logits, batch.labels).mean()[None]
        return each.sum(), each.detach()

    return torch.func.grad(total, has_aux=True)


def _positions(at: Tensor, objective: Objective) -> Tensor:
    """FT-L reads every target token off the last prompt position, FT-M off its own."""
    return at[:, :1].expand_as(at) if objective == "last" else at


def descend(step: Step, start: Tensors, rule: Rule, anchor: Params | None) -> dict[str, Tensor]:
    """Descend from `start` [E ...]; an edit whose loss is at most `stop_loss` stays as it is.

    The optimiser overwrites tensors made here, so that a step is one pass over memory.
    """
    make = {"adamw": optim.adamw, "adam": optim.adam, "sgd": optim.sgd}[rule.optimizer]
    rate = optim.exponential(rule.lr, rule.gamma)
    optimizer = make(rate, weight_decay=rule.weight_decay, donate=True)
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in start.items()}
    memory = optimizer.init(tensors, num_edits=next(iter(tensors.values())).shape[0])
    for number in range(rule.num_steps):
        grads, each = step(tensors)
        active = each > rule.stop_loss  # [E]
        if not bool(active.any()):
            break
        tensors, memory = optimizer.update(grads, memory, tensors, mask=active, anchor=anchor)
        if number == 0 and all(torch.equal(tensors[name], start[name]) for name in start):
            raise BadSettings(
                "what is trained must act on the answer, and the first step changed nothing: its "
                "gradient is zero at every site. Name other sites (`errata models` lists families)."
            )
        if rule.clamp is not None:
            tensors = optim.clamp(tensors, rule.clamp, donate=True)
    return tensors
