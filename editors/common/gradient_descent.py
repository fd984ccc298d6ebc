"""Gradient descent on a delta, many edits side by side, from a prefix computed once.

FT and LoRA (and, later, the values of GRACE and WISE) differ in which tensors they train; how they
train them is here. Legend: E edits · B rows · T scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from errata.functional import Batch, Delta, EditRecord, Header, Inputs, Model, Params, Query
from errata.functional.binding.bound_model import bind
from errata.functional.errors import InvalidInputError, InvalidSettingsError
from errata.functional.forward import prefix
from errata.functional.forward.batches import mean_per_edit
from errata.functional.gradients import optimizers, schedules
from errata.functional.gradients.factors import factored_gradients
from errata.functional.gradients.losses import nll

__all__ = [
    "DescentConfig",
    "DescentState",
    "Objective",
    "Step",
    "descend_each",
    "descend_jointly",
    "run_descent",
]

Objective = Literal["target_tokens", "last_prompt_token"]

Tensors = Mapping[str, Tensor]
MakeHeader = Callable[[Sequence[Query], int], Header]
ToDeltaTensors = Callable[[Tensors], Tensors]
Step = Callable[[Tensors], tuple[Any, Tensor]]  # tensors -> gradients, losses [E]


class DescentState(NamedTuple):
    """State of a descending editor: where the next edit starts, and the edits so far."""

    tensors: dict[str, Tensor]
    edits: tuple[EditRecord, ...] = ()


def require_no_edits(state: DescentState) -> DescentState:
    """The state, if no edit has been made from it: what edits side by side must start from.

    Raises InvalidInputError otherwise: a stacked delta lists one edit each, and could not tell of
    earlier.
    """
    if state.edits:
        raise InvalidInputError(
            f"edits side by side must start from a fresh state, and this one holds "
            f"{len(state.edits)}: take `editor.init(model, generator)`, or `editor.edit` to go on."
        )
    return state


class DescentConfig(NamedTuple):
    """How to descend: the settings that gradient-based editors share."""

    optimizer: Literal["adamw", "adam", "sgd"]
    lr: float
    num_steps: int
    weight_decay: float = 0.0
    lr_decay: float = 1.0  # the learning rate of step t is lr * gamma**t
    stop_loss: float = 0.0
    norm_constraint: float | None = None
    objective: Objective = "target_tokens"
    append_eos: bool = False  # the target is followed by the token that ends an answer


def descend_each(
    model: Model,
    make_header: MakeHeader,
    initial_tensors: Tensors,
    queries: Sequence[Query],
    config: DescentConfig,
    *,
    to_delta_tensors: ToDeltaTensors = dict,
    decay_reference: Params | None = None,
) -> dict[str, Tensor]:
    """Train one independent delta per query, side by side: tensors with a leading edit axis.

    `describe(queries, stack)` gives the header of the delta; `express` turns what is trained into
    the tensors of the delta; `decay_reference` holds the parameters that weight decay pulls to
    zero together with their change (AdamW acts on W + d, not on d).
    """
    header = make_header(queries, len(queries))
    depth = prefix.edit_depth(model.card, [entry.name for entry in header.entries])
    if depth.before_decoder:
        # Changes below the decoder act on pixels, where rows of one image have no edit axis.
        single_edits = [
            descend_jointly(
                model,
                make_header,
                initial_tensors,
                [query],
                config,
                to_delta_tensors=to_delta_tensors,
                decay_reference=decay_reference,
            )
            for query in queries
        ]
        return {
            name: torch.stack([tensors[name] for tensors in single_edits])
            for name in initial_tensors
        }
    stacked_tensors = {
        name: t.expand(len(queries), *t.shape) for name, t in initial_tensors.items()
    }
    batch = cast(Batch, prefix.run_prefix(model, _preprocess(model, queries, config), depth))
    batch = batch._replace(edit_index=torch.arange(len(queries), device=batch.edit_index.device))
    step = _make_stacked_step(model, header, batch, config, to_delta_tensors)
    return run_descent(step, stacked_tensors, config, decay_reference)


def descend_jointly(
    model: Model,
    make_header: MakeHeader,
    initial_tensors: Tensors,
    queries: Sequence[Query],
    config: DescentConfig,
    *,
    to_delta_tensors: ToDeltaTensors = dict,
    decay_reference: Params | None = None,
) -> dict[str, Tensor]:
    """Train one delta on all queries at once: the loss is the mean over queries."""
    inputs = _preprocess(model, queries, config)
    header = make_header(queries[:1], 1)
    depth = prefix.edit_depth(model.card, [entry.name for entry in header.entries])
    if depth.before_decoder:
        step = _make_embed_step(model, make_header(queries, 0), inputs, config, to_delta_tensors)
    else:
        batch = cast(Batch, prefix.run_prefix(model, inputs, depth))
        batch = batch._replace(edit_index=torch.zeros_like(batch.edit_index))
        step = _make_stacked_step(model, header, batch, config, to_delta_tensors)
    with_edit_axis = {name: tensor[None] for name, tensor in initial_tensors.items()}
    return {
        name: tensor[0]
        for name, tensor in run_descent(step, with_edit_axis, config, decay_reference).items()
    }


def _preprocess(model: Model, queries: Sequence[Query], config: DescentConfig) -> Inputs:
    return (
        model.preprocess(queries, append_eos=True)
        if config.append_eos
        else model.preprocess(queries)
    )


def _make_stacked_step(
    model: Model,
    header: Header,
    batch: Batch,
    config: DescentConfig,
    to_delta_tensors: ToDeltaTensors,
) -> Step:
    """Gradients and losses [E] of a stacked delta: rows run under the edit they name."""
    logit_positions = _select_positions(batch.logit_positions, config.objective)

    def loss(logits: Tensor):
        edit_losses = mean_per_edit(nll(logits, batch.labels), batch.edit_index, header.stack)
        return edit_losses.sum(), edit_losses.detach()

    if (
        to_delta_tensors is dict
    ):  # the tensors of the delta themselves: their gradients may stay in factors
        return lambda tensors: factored_gradients(
            model, Delta(header, tensors), batch, loss, logit_positions=logit_positions
        )

    def total_loss(tensors: Tensors):
        bound = bind(model, Delta(header, to_delta_tensors(tensors)), check=False)
        return loss(bound.decode(bound.params, batch, logit_positions=logit_positions))

    return torch.func.grad(total_loss, has_aux=True)


def _make_embed_step(
    model: Model,
    header: Header,
    inputs: Inputs,
    config: DescentConfig,
    to_delta_tensors: ToDeltaTensors,
) -> Step:
    """The same, one edit, for changes below the decoder: the vision path runs in every step."""

    def total_loss(tensors: Tensors):
        delta_tensors = to_delta_tensors({name: tensor[0] for name, tensor in tensors.items()})
        bound = bind(model, Delta(header, delta_tensors), check=False)
        batch = bound.embed(bound.params, inputs)
        logits = bound.decode(
            bound.params,
            batch,
            logit_positions=_select_positions(batch.logit_positions, config.objective),
        )
        edit_losses = nll(logits, batch.labels).mean()[None]
        return edit_losses.sum(), edit_losses.detach()

    return torch.func.grad(total_loss, has_aux=True)


def _select_positions(logit_positions: Tensor, objective: Objective) -> Tensor:
    """FT-L reads every target token off the last prompt position, FT-M off its own."""
    return (
        logit_positions[:, :1].expand_as(logit_positions)
        if objective == "last_prompt_token"
        else logit_positions
    )


def run_descent(
    step: Step, initial_tensors: Tensors, config: DescentConfig, decay_reference: Params | None
) -> dict[str, Tensor]:
    """Descend from `start` [E ...]; an edit whose loss is at most `stop_loss` stays as it is.

    The optimiser overwrites tensors made here, so that a step is one pass over memory.
    """
    make_optimizer = {"adamw": optimizers.adamw, "adam": optimizers.adam, "sgd": optimizers.sgd}[
        config.optimizer
    ]
    lr_schedule = schedules.exponential_schedule(config.lr, config.lr_decay)
    optimizer = make_optimizer(lr_schedule, weight_decay=config.weight_decay, inplace=True)
    tensors = {
        name: tensor.to(torch.float32, copy=True) for name, tensor in initial_tensors.items()
    }
    optimizer_state = optimizer.init(tensors, num_edits=next(iter(tensors.values())).shape[0])
    for step_number in range(config.num_steps):
        grads, edit_losses = step(tensors)
        active = edit_losses > config.stop_loss  # [E]
        if not bool(active.any()):
            break
        tensors, optimizer_state = optimizer.update(
            grads, optimizer_state, tensors, mask=active, decay_reference=decay_reference
        )
        if step_number == 0 and all(
            torch.equal(tensors[name], initial_tensors[name]) for name in initial_tensors
        ):
            raise InvalidSettingsError(
                "what is trained must act on the answer, and the first step changed nothing: its "
                "gradient is zero at every site. Name other sites (`errata models` lists families)."
            )
        if config.norm_constraint is not None:
            tensors = schedules.clip_elements(tensors, config.norm_constraint, inplace=True)
    return tensors
