"""`TrainableEditor`: an editor with everything the training loop needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from errata.editors.training.batches import TrainingBatch
from errata.functional import Editor, Model
from errata.functional.forward.prefix import EditDepth
from errata.functional.types import State

__all__ = ["Prepared", "TrainableEditor"]

Prepared = Any
"""What `TrainableEditor.prepare` passes to `loss`: a pytree."""


class TrainableEditor(NamedTuple):
    """A method that is trained before it edits, as pure functions.

    Attributes:
        editor: The editor that is trained.
        loss: (model, state, prepared) -> (loss [], terms by name), differentiable in the trained
            parameters of `state`.
        sites: (model) -> paths of the modules it edits, all in decoder layers.
        parameters: (state) -> the trained part, a NamedTuple of pytrees. Each field can have a
            learning rate.
        with_parameters: (state, parameters) -> the state with another trained part.
        prepare: (model, state, batch, is_training) -> (state, prepared): what needs no gradient of
            the trained part. Statistics of the state are updated if `is_training`.
        weights: (state) -> what a file of trained weights holds, a pytree of tensors.
        compatibility: (model) -> what such a file must fit: sizes, sites, hashes of the base.
        append_eos: Whether the token that ends an answer is trained too.
        edit_depth: The depth at which rows are cut. None: the depth of `sites`.
    """

    editor: Editor
    loss: Callable[[Model, State, Prepared], tuple[Tensor, Mapping[str, Tensor]]]
    sites: Callable[[Model], Sequence[str]]
    parameters: Callable[[State], Any]
    with_parameters: Callable[[State, Any], State]
    prepare: Callable[[Model, State, TrainingBatch, bool], tuple[State, Prepared]]
    weights: Callable[[State], Any]
    compatibility: Callable[[Model], Mapping[str, Any]]
    append_eos: bool = False
    edit_depth: EditDepth | None = None
