"""One training loop for every editor that learns to edit.

A lesson is a handful of cases, each edited on its own, side by side; the edited models answer the
cases' other questions, and the loss is

    L = sum over probes of weight * mean( NLL(p', target) )        where the edit should reach
      + sum over localities of weight * mean( KL(p || p') )        where nothing should change

The base never changes in training, so everything below the lowest edited layer, vision included,
is computed once per question, ever, and kept (in memory, then on disk, both bounded). Each case is
computed alone: what it gives does not depend on who shared its batch, so a training that was
killed goes on to the same bits.

Weights and losses: Mitchell et al. 2022 (c_edit 0.1, c_loc 1); EasyEdit `MultimodalTrainer.py`
(0.1 for rephrased pictures). Its early stopping never stops and its resumed normaliser starts over;
here both are part of the checkpoint.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import Case, Model, optim, prefix
from errata.functional.errors import BadInput
from errata.functional.losses import kl, nll
from errata.functional.prefix import Reach
from errata.functional.records import base_of
from errata.functional.types import Learner, State

from . import statefile
from .lessons import Lesson, Shelf

__all__ = [
    "PUBLISHED", "Course", "Fit", "FitConfig", "Lesson", "Progress", "combined", "fit", "weighed",
]  # fmt: skip


PUBLISHED = {
    "rephrase": 0.1,
    "image_rephrase": 0.1,
    "text_locality": 1.0,
    "image_locality": 1.0,
}
"""MEND's weights, as EasyEdit has them for pictures."""


class Course(NamedTuple):
    """How a `Learner` is trained.

    sites(model) -> paths of the modules it edits; all of them in decoder layers
    trained(state) -> the part that descends, a NamedTuple; placed(state, part) puts it back
    study(model, state, lesson, learn) -> (state, what `learner.loss` takes)
        The part without meta-gradient; with `learn` what is counted along the way is counted.
    end: the token that ends an answer is learned with it.
    reach: where rows are cut, for what reads them below its sites; None: where the sites are.
    """

    learner: Learner
    sites: Callable[[Model], Sequence[str]]
    trained: Callable[[State], Any]
    placed: Callable[[State, Any], State]
    study: Callable[[Model, State, Lesson, bool], tuple[State, Any]]
    end: bool = False
    reach: Reach | None = None


class FitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a training; a `weights` of "edit" asks the edit's own question too."""

    num_steps: Annotated[int, msgspec.Meta(ge=1)] = 1000
    together: Annotated[int, msgspec.Meta(ge=1)] = 8  # cases of a lesson
    accumulate: Annotated[int, msgspec.Meta(ge=1)] = 1  # lessons of a step
    asks: Annotated[int, msgspec.Meta(ge=1)] = 1  # questions drawn of each probe of a case
    lr: Annotated[float, msgspec.Meta(gt=0)] = 1e-4
    lr_of: dict[str, float] = {}  # another rate for a field of what is trained
    warmup: Annotated[int, msgspec.Meta(ge=0)] = 0
    decay: bool = False  # linearly to zero at the last step
    clip: Annotated[float, msgspec.Meta(gt=0)] = 100.0
    weights: dict[str, float] = msgspec.field(default_factory=lambda: dict(PUBLISHED))
    held: Annotated[int, msgspec.Meta(ge=0)] = 16  # cases kept out, to validate on
    validate_every: Annotated[int, msgspec.Meta(ge=1)] = 100
    patience: Annotated[int, msgspec.Meta(ge=1)] = 5  # validations without a better loss
    save_every: Annotated[int, msgspec.Meta(ge=1)] = 100
    seed: int = 0
    memory: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30  # bytes of prefixes in memory
    disk: Annotated[int, msgspec.Meta(ge=0)] = 0  # bytes of prefixes on disk, in the folder


class Progress(NamedTuple):
    """One step: its mean loss and terms, how fast it goes, and the last validation's loss."""

    step: int
    of: int
    loss: float
    terms: Mapping[str, float]
    held: float | None
    cases_per_second: float


class Fit(NamedTuple):
    """A finished training: the best state, its validation loss, steps done, why it ended."""

    state: State
    held: float | None
    steps: int
    stopped_early: bool


class _Point(NamedTuple):
    """Everything a training is, between two steps."""

    state: State
    memory: dict[str, Any]  # of the optimiser
    best: State
    least: Tensor  # [] float64: the best validation loss
    waited: Tensor  # [] int64: validations since
    step: Tensor  # [] int64
    draws: Tensor  # state of the generator


def fit(
    model: Model,
    course: Course,
    cases: Sequence[Case],
    config: FitConfig = FitConfig(),
    *,
    folder: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Fit:
    """Train an editor on cases; with a `folder`, go on from the checkpoint there.

    The last `config.held` cases are validated on, never trained on. A checkpoint is written whole
    or not at all and resumes to the same bits. Raises BadInput for a checkpoint of another
    training, too few cases, or cases that lack a probe that has a weight.
    """
    learned, held = _parted(cases, config)
    shelf = Shelf(model, course.sites(model), config, course.end, folder, course.reach)
    rates = _rates(config, course, model)
    about = _about(model, course, cases, config)
    path = Path(folder) / "checkpoint.safetensors" if folder else None
    point = _start(model, course, config, rates)
    if path and path.is_file():
        point = statefile.recall(path, point, about)
    began, begun = time.perf_counter(), int(point.step)
    last = float(point.least) if torch.isfinite(point.least) else None
    draws = torch.Generator()
    while int(point.step) < config.num_steps and int(point.waited) < config.patience:
        draws.set_state(point.draws)
        point, loss, terms = _step(model, course, shelf, learned, config, rates, point, draws)
        step = int(point.step)
        if held and (step % config.validate_every == 0 or step == config.num_steps):
            last = _validate(model, course, shelf, held, config, point.state)
            point = _judged(point, last)
        if path and (step % config.save_every == 0 or step == config.num_steps):
            path.parent.mkdir(parents=True, exist_ok=True)
            statefile.keep(path, point, about)
        if progress:
            done = (step - begun) * config.together * config.accumulate
            rate = done / max(1e-9, time.perf_counter() - began)
            progress(Progress(step, config.num_steps, loss, terms, last, rate))
    stopped = int(point.waited) >= config.patience
    found = point.best if torch.isfinite(point.least) else point.state
    least = float(point.least) if torch.isfinite(point.least) else None
    return Fit(found, least, int(point.step), stopped)


def weighed(edited: Model, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a lesson under a model that carries its edits, and each probe's own part."""
    if all(prefix.narrows(edited.card, delta.header) for delta in edited.deltas):
        logits = prefix.narrow(edited, lesson.asks)
    else:
        logits = edited.decode(edited.params, lesson.asks)
    first = lesson.asks.rows - lesson.base.shape[0]  # localities come last
    labels = lesson.asks.labels
    return combined(
        torch.cat(
            [nll(logits[:first], labels[:first]), kl(lesson.base, logits[first:], labels[first:])]
        ),
        lesson,
    )


def combined(values: Tensor, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a lesson from its rows' own [B], and each probe's mean."""
    terms = {}
    total = values.new_zeros(())
    for number, (name, weight) in enumerate(lesson.weights.items()):
        mine = lesson.probe == number
        mean = torch.where(mine, values, 0).sum() / mine.sum().clamp_min(1)
        terms[name] = mean.detach()
        total = total + weight * mean
    return total, terms


def _parted(cases: Sequence[Case], config: FitConfig) -> tuple[list[Case], list[Case]]:
    faults = []
    if len(cases) - config.held < config.together:
        faults.append(
            f"{len(cases)} cases with {config.held} held out leave fewer than the "
            f"{config.together} of a lesson"
        )
    for name in config.weights:
        without = [case.id for case in cases if name != "edit" and not case.probes.get(name)]
        if without:
            faults.append(f"{len(without)} case(s) have no {name!r}, e.g. {without[0]}")
    if faults:
        raise BadInput(f"cases must suit the training: {'; '.join(faults)}.")
    first = len(cases) - config.held
    return list(cases[:first]), list(cases[first:])


def _rates(config: FitConfig, course: Course, model: Model) -> dict[str, optim.Optimizer]:
    def schedule(lr: float) -> optim.Schedule:
        def at(step: Tensor) -> Tensor:
            up = ((step + 1) / max(1, config.warmup)).clamp_max(1.0)
            down = 1 - step / config.num_steps if config.decay else torch.ones_like(step)
            return lr * up * down

        return at

    fields = course.trained(_fresh(model, course, config))._fields
    unknown = sorted(set(config.lr_of) - set(fields))
    if unknown:
        raise BadInput(f"lr_of must name some of {', '.join(fields)}; got {', '.join(unknown)}.")
    rates = {name: schedule(config.lr_of.get(name, config.lr)) for name in fields}
    return {name: optim.adam(rate, donate=True) for name, rate in rates.items()}


def _fresh(model: Model, course: Course, config: FitConfig) -> State:
    return course.learner.editor.init(model, torch.Generator().manual_seed(config.seed))


def _start(model, course: Course, config: FitConfig, rates) -> _Point:
    state = _copied(_fresh(model, course, config))
    part = course.trained(state)
    return _Point(
        state=state,
        memory={name: rates[name].init(getattr(part, name)) for name in part._fields},
        best=_copied(state),
        least=torch.tensor(torch.inf, dtype=torch.float64),
        waited=torch.tensor(0),
        step=torch.tensor(0),
        draws=torch.Generator().manual_seed(config.seed + 1).get_state(),
    )


def _step(model, course: Course, shelf: Shelf, cases, config: FitConfig, rates, point, draws):
    """One update of what is trained, from `accumulate` lessons."""
    state, whole, losses, terms = point.state, None, [], []
    for _ in range(config.accumulate):
        chosen = torch.randperm(len(cases), generator=draws)[: config.together].tolist()
        lesson = shelf.lesson([cases[k] for k in chosen], draws)
        state, studied = course.study(model, state, lesson, True)

        def loss(part, state=state, studied=studied):
            value, found = course.learner.loss(model, course.placed(state, part), studied)
            return value / config.accumulate, (value.detach(), found)

        grads, (value, found) = torch.func.grad(loss, has_aux=True)(course.trained(state))
        whole = grads if whole is None else pytree.tree_map(torch.add, whole, grads)
        losses.append(value)
        terms.append(found)
    part = course.trained(state)
    grads, size = optim.clip_norm(whole, config.clip)
    memory = point.memory
    if bool(torch.isfinite(size)):  # a lesson whose gradient is not a number teaches nothing
        updated, memory = {}, {}
        for name in part._fields:
            updated[name], memory[name] = rates[name].update(
                getattr(grads, name), point.memory[name], getattr(part, name)
            )
        part = type(part)(**updated)
    after = point._replace(
        state=course.placed(state, part), memory=memory, step=point.step + 1,
        draws=draws.get_state(),
    )  # fmt: skip
    mean = {name: float(sum(t[name] for t in terms)) / len(terms) for name in terms[0]}
    return after, float(sum(losses)) / len(losses), mean


def _validate(model, course: Course, shelf: Shelf, cases, config: FitConfig, state) -> float:
    """The mean loss over held-out cases, the first questions of each probe."""
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(cases), config.together):
            chunk = cases[first : first + config.together]
            _, studied = course.study(model, state, shelf.lesson(chunk, None), False)
            total += float(course.learner.loss(model, state, studied)[0]) * len(chunk)
    return total / len(cases)


def _judged(point: _Point, loss: float) -> _Point:
    if loss < float(point.least):
        return point._replace(
            best=_copied(point.state),
            least=torch.tensor(loss, dtype=torch.float64),
            waited=torch.zeros_like(point.waited),
        )
    return point._replace(waited=point.waited + 1)


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _about(model: Model, course: Course, cases: Sequence[Case], config: FitConfig):
    """What makes a checkpoint this training's: settings, base, cases."""
    editor = course.learner.editor
    base = base_of(model, [path + ".weight" for path in course.sites(model)])
    lasting = {**msgspec.to_builtins(config), "memory": 0, "disk": 0, "save_every": 0}
    names = hashlib.sha256("\n".join(case.id for case in cases).encode()).hexdigest()
    return {
        "editor": editor.name,
        "settings": msgspec.to_builtins(editor.settings),
        "base": msgspec.to_builtins(base),
        "config": lasting,
        "cases": names,
    }
