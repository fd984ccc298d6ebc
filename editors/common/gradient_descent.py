"""Gradient descent on a delta, for many edits at once, from a prefix computed once.

FT and LoRA differ in the tensors they train and share the loop. GRACE trains its values with
`run_descent`. Legend: E edits · B rows · T scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from errata.functional import Batch, Delta, EditRecord, Header, Inputs, Model, Params, Query
from errata.functional.binding.bound_model import bind
from errata.functional.errors import EditDivergedError, InvalidInputError, InvalidSettingsError
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
Step = Callable[[Tensors], tuple[Any, Tensor]]  # tensors -> (gradients, losses [E])


class DescentState(NamedTuple):
    """State of FT and LoRA.

    Attributes:
        tensors: What the next edit starts from, fp32.
        edits: The edits so far.
    """

    tensors: dict[str, Tensor]
    edits: tuple[EditRecord, ...] = ()


def require_no_edits(state: DescentState) -> DescentState:
    """Check that a state holds no edits, as independent edits require.

    A stacked delta records one edit per entry of the stack, so it cannot record earlier ones.

    Args:
        state: The state.

    Returns:
        The state, unchanged.

    Raises:
        InvalidInputError: If an edit was made from the state.
    """
    if state.edits:
        raise InvalidInputError(
            f"independent edits must start from a fresh state, and this one holds "
            f"{len(state.edits)}: take `editor.init(model, generator)`, or call `editor.edit` to "
            "continue."
        )
    return state


class DescentConfig(NamedTuple):
    """Settings that gradient-based editors share.

    Attributes:
        optimizer: Name of the optimizer.
        lr: Learning rate of the first step.
        num_steps: Steps, at most.
        weight_decay: Weight decay, decoupled for adamw.
        lr_decay: Factor of the learning rate per step: step t has lr * lr_decay**t.
        stop_loss: Loss in nats per token at which an edit stops. 0: never.
        norm_constraint: Bound on each trained element's absolute value. None: no bound.
        objective: "target_tokens" scores each target token after those before it (FT-M).
            "last_prompt_token" scores all of them at the last prompt token (FT-L).
        append_eos: Whether the token that ends an answer is part of the target.
    """

    optimizer: Literal["adamw", "adam", "sgd"]
    lr: float
    num_steps: int
    weight_decay: float = 0.0
    lr_decay: float = 1.0
    stop_loss: float = 0.0
    norm_constraint: float | None = None
    objective: Objective = "target_tokens"
    append_eos: bool = False


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
    """Train one independent delta per query, all at once.

    Changes before the decoder are trained one query after another.

    Args:
        model: The base model.
        make_header: (queries, stack) -> the header of the delta.
        initial_tensors: Start of each edit, without an edit axis.
        queries: The edits, E of them.
        config: The settings.
        to_delta_tensors: Maps the trained tensors to those of the delta.
        decay_reference: Parameters that weight decay shrinks together with their change: AdamW acts
            on W + d then, not on d. None: on the trained tensors alone.

    Returns:
        The trained tensors [E ...], by name.

    Raises:
        InvalidSettingsError: If the first step changes nothing.
    """
    header = make_header(queries, len(queries))
    depth = prefix.header_depth(model.card, header)
    if depth.before_decoder:
        # Vision inputs have no edit axis, so changes before the decoder cannot be stacked.
        single_edits = []
        for number, query in enumerate(queries):
            try:
                tensors = descend_jointly(
                    model,
                    make_header,
                    initial_tensors,
                    [query],
                    config,
                    to_delta_tensors=to_delta_tensors,
                    decay_reference=decay_reference,
                )
            except EditDivergedError as error:
                raise EditDivergedError("gradient descent", [number], len(queries)) from error
            single_edits.append(tensors)
        return {
            name: torch.stack([tensors[name] for tensors in single_edits])
            for name in initial_tensors
        }
    stacked_tensors = {
        name: t.expand(len(queries), *t.shape) for name, t in initial_tensors.items()
    }
    batch = cast(Batch, prefix.run_prefix(model, _preprocess(model, queries, config), depth))
    batch = batch._replace(
        edit_index=torch.arange(len(queries), device=batch.edit_index.device, dtype=torch.int64)
    )
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
    """Train one delta on all queries together, on the mean of their losses.

    Args:
        model: The base model.
        make_header: (queries, stack) -> the header of the delta.
        initial_tensors: Start of the edit.
        queries: The edits.
        config: The settings.
        to_delta_tensors: Maps the trained tensors to those of the delta.
        decay_reference: Parameters that weight decay shrinks together with their change: AdamW acts
            on W + d then, not on d. None: on the trained tensors alone.

    Returns:
        The trained tensors, by name.

    Raises:
        InvalidSettingsError: If the first step changes nothing.
    """
    inputs = _preprocess(model, queries, config)
    header = make_header(queries[:1], 1)
    depth = prefix.header_depth(model.card, header)
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
    """Make the step of a stacked delta: gradients, and losses [E].

    Each row runs under the edit of its `edit_index`.
    """
    logit_positions = _select_positions(batch.logit_positions, config.objective)

    def loss(logits: Tensor):
        edit_losses = mean_per_edit(nll(logits, batch.labels), batch.edit_index, header.stack)
        return edit_losses.sum(), edit_losses.detach()

    if to_delta_tensors is dict:  # gradients of the delta's own tensors may stay in factors
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
    """Make the step of one edit that acts before the decoder.

    The vision path runs in every step.
    """

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
    """Select the positions whose logits are scored.

    FT-L predicts every target token at the last prompt position. FT-M predicts each after those
    before.
    """
    return (
        logit_positions[:, :1].expand_as(logit_positions)
        if objective == "last_prompt_token"
        else logit_positions
    )


def run_descent(
    step: Step, initial_tensors: Tensors, config: DescentConfig, decay_reference: Params | None
) -> dict[str, Tensor]:
    """Descend from `initial_tensors` for at most `config.num_steps` steps.

    An edit keeps its tensors in each step before which its loss is at most `config.stop_loss`. The
    optimizer overwrites tensors that are copied here, so a step is one pass over memory.

    Args:
        step: Maps tensors to their gradients and the losses [E].
        initial_tensors: Start [E ...], by name. Not changed.
        config: The settings.
        decay_reference: Parameters that weight decay shrinks together with their change, by name.
            None: it shrinks the trained tensors alone.

    Returns:
        The trained tensors [E ...] in fp32, by name.

    Raises:
        InvalidSettingsError: If the first step changes nothing.
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
        is_finite = edit_losses.isfinite()
        some_active, all_finite = torch.stack([active.any(), is_finite.all()]).tolist()
        if not all_finite:
            bad = (~is_finite).nonzero()[:, 0].tolist()
            raise EditDivergedError("gradient descent", bad, len(edit_losses))
        if not some_active:
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
