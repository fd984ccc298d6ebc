"""`TrainableEditor`: an editor, its loss, and what the loop needs to train it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from errata.editors.training.batches import TrainingBatch
from errata.functional import Model
from errata.functional.forward.prefix import EditDepth
from errata.functional.types import Learner, State

__all__ = ["TrainableEditor"]


class TrainableEditor(NamedTuple):
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
    parameters: Callable[[State], Any]
    with_parameters: Callable[[State, Any], State]
    prepare: Callable[[Model, State, TrainingBatch, bool], tuple[State, Any]]
    append_eos: bool = False
    edit_depth: EditDepth | None = None
