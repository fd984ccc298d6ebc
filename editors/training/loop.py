"""One training loop for every editor that is trained.

A training batch is a handful of cases, each edited independently. The edited models answer the
cases' other questions, and the loss is

    L = sum over probes of weight * mean( NLL(p', target) )        where the edit should act
      + sum over localities of weight * mean( KL(p || p') )        where nothing should change

The base never changes in training, so everything below the lowest edited layer, vision included,
is computed once per question and kept (in memory, then on disk, both bounded). Each case is
computed alone: its result does not depend on the other cases of its batch, so an interrupted
training resumes to the same bits.

Weights and losses: Mitchell et al. 2022 (c_edit 0.1, c_loc 1); EasyEdit `MultimodalTrainer.py`
(0.1 for rephrased images). Its early stopping never stops and its resumed normaliser starts over;
here both are part of the checkpoint.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.editors.common import checkpoint
from errata.editors.training.batches import PrefixDataset
from errata.editors.training.config import TrainingConfig
from errata.editors.training.trainable import TrainableEditor
from errata.functional import Case, Model
from errata.functional.deltas.records import base_identity
from errata.functional.errors import InvalidInputError
from errata.functional.gradients import optimizers, schedules
from errata.functional.types import State

__all__ = ["TrainingProgress", "TrainingResult", "train"]


class TrainingProgress(NamedTuple):
    """One step: its mean loss and terms, how fast it goes, and the last validation's loss."""

    step: int
    num_steps: int
    loss: float
    terms: Mapping[str, float]
    validation_loss: float | None
    cases_per_second: float


class TrainingResult(NamedTuple):
    """A finished training: the best state, its validation loss, steps done, why it ended."""

    state: State
    validation_loss: float | None
    num_steps: int
    stopped_early: bool


class _TrainingState(NamedTuple):
    """Everything a training is, between two steps."""

    state: State
    optimizer_state: dict[str, Any]  # of the optimiser
    best_state: State
    best_loss: Tensor  # [] float64: the best validation loss
    num_stale_evaluations: Tensor  # [] int64: validations since
    step: Tensor  # [] int64
    generator_state: Tensor  # state of the generator


def train(
    model: Model,
    trainable: TrainableEditor,
    cases: Sequence[Case],
    config: TrainingConfig = TrainingConfig(),
    *,
    checkpoint_dir: str | Path | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Train an editor on cases; resumes from the checkpoint in `checkpoint_dir`, if there is one.

    A checkpoint is written whole or not at all and resumes to the same bits.

    Args:
        model: Model to train for; unchanged.
        trainable: The editor with its loss.
        cases: Cases; the last `config.num_validation_cases` are validated on, never trained on.
        config: Training settings.
        checkpoint_dir: Folder of the checkpoint and of cached prefixes. None keeps nothing.
        progress: Called after every step.

    Returns:
        The trained state and the validation's history.

    Raises:
        InvalidInputError: For a checkpoint of another training, too few cases, or cases that lack a
            probe that has a weight.
    """
    training_cases, validation_cases = _split_cases(cases, config)
    dataset = PrefixDataset(
        model,
        trainable.sites(model),
        config,
        trainable.append_eos,
        checkpoint_dir,
        trainable.edit_depth,
    )
    field_optimizers = _make_optimizers(config, trainable, model)
    compatibility = _compatibility(model, trainable, cases, config)
    path = Path(checkpoint_dir) / "checkpoint.safetensors" if checkpoint_dir else None
    training_state = _init_training(model, trainable, config, field_optimizers)
    if path and path.is_file():
        training_state = checkpoint.load_checkpoint(path, training_state, compatibility)
    start_time, first_step = time.perf_counter(), int(training_state.step)
    validation_loss = (
        float(training_state.best_loss) if torch.isfinite(training_state.best_loss) else None
    )
    generator = torch.Generator()
    while (
        int(training_state.step) < config.num_steps
        and int(training_state.num_stale_evaluations) < config.early_stopping_patience
    ):
        generator.set_state(training_state.generator_state)
        training_state, loss, terms = _train_step(
            model,
            trainable,
            dataset,
            training_cases,
            config,
            field_optimizers,
            training_state,
            generator,
        )
        step = int(training_state.step)
        if validation_cases and (step % config.eval_every == 0 or step == config.num_steps):
            validation_loss = _validate(
                model, trainable, dataset, validation_cases, config, training_state.state
            )
            training_state = _update_best(training_state, validation_loss)
        if path and (step % config.save_every == 0 or step == config.num_steps):
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_checkpoint(path, training_state, compatibility)
        if progress:
            num_cases = (step - first_step) * config.batch_size * config.gradient_accumulation_steps
            cases_per_second = num_cases / max(1e-9, time.perf_counter() - start_time)
            progress(
                TrainingProgress(
                    step, config.num_steps, loss, terms, validation_loss, cases_per_second
                )
            )
    stopped_early = int(training_state.num_stale_evaluations) >= config.early_stopping_patience
    final_state = (
        training_state.best_state
        if torch.isfinite(training_state.best_loss)
        else training_state.state
    )
    best_loss = (
        float(training_state.best_loss) if torch.isfinite(training_state.best_loss) else None
    )
    return TrainingResult(final_state, best_loss, int(training_state.step), stopped_early)


def _split_cases(cases: Sequence[Case], config: TrainingConfig) -> tuple[list[Case], list[Case]]:
    faults = []
    if len(cases) - config.num_validation_cases < config.batch_size:
        faults.append(
            f"{len(cases)} cases with {config.num_validation_cases} held out leave fewer than the "
            f"{config.batch_size} of a batch"
        )
    for name in config.loss_weights:
        lacking = [case.id for case in cases if name != "edit" and not case.probes.get(name)]
        if lacking:
            faults.append(f"{len(lacking)} case(s) have no {name!r}, e.g. {lacking[0]}")
    if faults:
        raise InvalidInputError(f"cases must suit the training: {'; '.join(faults)}.")
    first = len(cases) - config.num_validation_cases
    return list(cases[:first]), list(cases[first:])


def _make_optimizers(
    config: TrainingConfig, trainable: TrainableEditor, model: Model
) -> dict[str, optimizers.Optimizer]:
    def schedule(lr: float) -> schedules.Schedule:
        def lr_at(step: Tensor) -> Tensor:
            warmup_factor = ((step + 1) / max(1, config.warmup_steps)).clamp_max(1.0)
            decay_factor = (
                1 - step / config.num_steps if config.linear_decay else torch.ones_like(step)
            )
            return lr * warmup_factor * decay_factor

        return lr_at

    fields = trainable.parameters(_init_state(model, trainable, config))._fields
    unknown = sorted(set(config.lr_by_group) - set(fields))
    if unknown:
        raise InvalidInputError(
            f"lr_by_group must name some of {', '.join(fields)}; got {', '.join(unknown)}."
        )
    lr_schedules = {name: schedule(config.lr_by_group.get(name, config.lr)) for name in fields}
    return {name: optimizers.adam(rate, inplace=True) for name, rate in lr_schedules.items()}


def _init_state(model: Model, trainable: TrainableEditor, config: TrainingConfig) -> State:
    return trainable.editor.init(model, torch.Generator().manual_seed(config.seed))


def _init_training(
    model, trainable: TrainableEditor, config: TrainingConfig, field_optimizers
) -> _TrainingState:
    state = _copy_tensors(_init_state(model, trainable, config))
    parameters = trainable.parameters(state)
    return _TrainingState(
        state=state,
        optimizer_state={
            name: field_optimizers[name].init(getattr(parameters, name))
            for name in parameters._fields
        },
        best_state=_copy_tensors(state),
        best_loss=torch.tensor(torch.inf, dtype=torch.float64, device="cpu"),
        num_stale_evaluations=torch.tensor(0, dtype=torch.int64, device="cpu"),
        step=torch.tensor(0, dtype=torch.int64, device="cpu"),
        generator_state=torch.Generator().manual_seed(config.seed + 1).get_state(),
    )


def _train_step(
    model,
    trainable: TrainableEditor,
    dataset: PrefixDataset,
    cases,
    config: TrainingConfig,
    field_optimizers,
    training_state,
    generator,
):
    """One update of what is trained, from `accumulate` lessons."""
    state, total_grads, losses, terms = training_state.state, None, [], []
    for _ in range(config.gradient_accumulation_steps):
        chosen = torch.randperm(len(cases), generator=generator, dtype=torch.int64, device="cpu")[
            : config.batch_size
        ].tolist()
        training_batch = dataset.batch([cases[k] for k in chosen], generator)
        state, prepared = trainable.prepare(model, state, training_batch, True)

        def loss(parameters, state=state, prepared=prepared):
            value, batch_terms = trainable.loss(
                model, trainable.with_parameters(state, parameters), prepared
            )
            return value / config.gradient_accumulation_steps, (value.detach(), batch_terms)

        grads, (value, found) = torch.func.grad(loss, has_aux=True)(trainable.parameters(state))
        total_grads = (
            grads if total_grads is None else pytree.tree_map(torch.add, total_grads, grads)
        )
        losses.append(value)
        terms.append(found)
    parameters = trainable.parameters(state)
    grads, grad_norm = schedules.clip_grad_norm(total_grads, config.max_grad_norm)
    optimizer_state = training_state.optimizer_state
    if bool(torch.isfinite(grad_norm)):  # skip a batch whose gradient is not finite
        updated, optimizer_state = {}, {}
        for name in parameters._fields:
            updated[name], optimizer_state[name] = field_optimizers[name].update(
                getattr(grads, name),
                training_state.optimizer_state[name],
                getattr(parameters, name),
            )
        parameters = type(parameters)(**updated)
    next_state = training_state._replace(
        state=trainable.with_parameters(state, parameters),
        optimizer_state=optimizer_state,
        step=training_state.step + 1,
        generator_state=generator.get_state(),
    )
    mean_terms = {name: float(sum(t[name] for t in terms)) / len(terms) for name in terms[0]}
    return next_state, float(sum(losses)) / len(losses), mean_terms


def _validate(
    model, trainable: TrainableEditor, dataset: PrefixDataset, cases, config: TrainingConfig, state
) -> float:
    """The mean loss over held-out cases, the first questions of each probe."""
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(cases), config.batch_size):
            chunk = cases[first : first + config.batch_size]
            _, prepared = trainable.prepare(model, state, dataset.batch(chunk, None), False)
            total += float(trainable.loss(model, state, prepared)[0]) * len(chunk)
    return total / len(cases)


def _update_best(training_state: _TrainingState, loss: float) -> _TrainingState:
    if loss < float(training_state.best_loss):
        return training_state._replace(
            best_state=_copy_tensors(training_state.state),
            best_loss=torch.tensor(loss, dtype=torch.float64, device="cpu"),
            num_stale_evaluations=torch.zeros_like(training_state.num_stale_evaluations),
        )
    return training_state._replace(num_stale_evaluations=training_state.num_stale_evaluations + 1)


def _copy_tensors(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _compatibility(
    model: Model, trainable: TrainableEditor, cases: Sequence[Case], config: TrainingConfig
):
    """What makes a checkpoint this training's: settings, base, cases."""
    editor = trainable.editor
    base = base_identity(model, [path + ".weight" for path in trainable.sites(model)])
    lasting_config = {
        **msgspec.to_builtins(config),
        "prefix_cache_bytes": 0,
        "prefix_disk_bytes": 0,
        "save_every": 0,
    }
    case_ids_digest = hashlib.sha256("\n".join(case.id for case in cases).encode()).hexdigest()
    return {
        "editor": editor.name,
        "settings": msgspec.to_builtins(editor.config),
        "base": msgspec.to_builtins(base),
        "config": lasting_config,
        "cases": case_ids_digest,
    }
