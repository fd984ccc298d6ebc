"""`TrainingConfig`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from errata.editors.common.settings import LearningRate, NumSteps

__all__ = ["MEND_LOSS_WEIGHTS", "TrainingConfig"]

MEND_LOSS_WEIGHTS = {
    "rephrase": 0.1,
    "image_rephrase": 0.1,
    "text_locality": 1.0,
    "image_locality": 1.0,
}
"""MEND's weights, as EasyEdit has them for images."""


MAX_SIZE = 1 << 20


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a training; a `weights` of "edit" asks the edit's own question too."""

    num_steps: NumSteps = 1000
    batch_size: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Cases per batch.",
        ),
    ] = 8
    gradient_accumulation_steps: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Batches per step.",
        ),
    ] = 1
    questions_per_probe: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Questions drawn from each probe of a case.",
        ),
    ] = 1
    lr: LearningRate = 1e-4
    lr_by_group: Annotated[
        dict[str, float],
        msgspec.Meta(description="Learning rates of single fields of the trained parameters."),
    ] = {}
    warmup_steps: Annotated[int, msgspec.Meta(ge=0, description="Steps of linear warmup.")] = 0
    linear_decay: Annotated[
        bool, msgspec.Meta(description="Whether the rate decays linearly to zero at the last step.")
    ] = False
    max_grad_norm: Annotated[
        float, msgspec.Meta(gt=0, description="Gradient norm to which larger gradients are scaled.")
    ] = 100.0
    loss_weights: Annotated[
        dict[str, float],
        msgspec.Meta(
            description='Weight of each probe in the loss. "edit" is the edit\'s own question.'
        ),
    ] = msgspec.field(default_factory=lambda: dict(MEND_LOSS_WEIGHTS))
    num_validation_cases: Annotated[
        int, msgspec.Meta(ge=0, description="Cases held out for validation, the last ones.")
    ] = 16
    eval_every: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Steps between validations.",
        ),
    ] = 100
    early_stopping_patience: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1 << 20,
            description="Validations without improvement after which training stops.",
        ),
    ] = 5
    save_every: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Steps between checkpoints.",
        ),
    ] = 100
    seed: Annotated[int, msgspec.Meta(description="Seed of initialization and sampling.")] = 0
    prefix_cache_bytes: Annotated[
        int, msgspec.Meta(ge=0, description="Memory for cached prefixes, in bytes.")
    ] = 1 << 30
    prefix_disk_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="Disk for cached prefixes in the checkpoint folder, in bytes."
        ),
    ] = 0
