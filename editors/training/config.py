"""`TrainingConfig`."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["MEND_LOSS_WEIGHTS", "TrainingConfig"]

MEND_LOSS_WEIGHTS = {
    "rephrase": 0.1,
    "image_rephrase": 0.1,
    "text_locality": 1.0,
    "image_locality": 1.0,
}
"""MEND's weights, as EasyEdit has them for pictures."""


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a training; a `weights` of "edit" asks the edit's own question too."""

    num_steps: Annotated[int, msgspec.Meta(ge=1)] = 1000
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 8  # cases of a lesson
    gradient_accumulation_steps: Annotated[int, msgspec.Meta(ge=1)] = 1  # lessons of a step
    questions_per_probe: Annotated[int, msgspec.Meta(ge=1)] = (
        1  # questions drawn of each probe of a case
    )
    lr: Annotated[float, msgspec.Meta(gt=0)] = 1e-4
    lr_by_group: dict[str, float] = {}  # another rate for a field of what is trained
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    linear_decay: bool = False  # linearly to zero at the last step
    max_grad_norm: Annotated[float, msgspec.Meta(gt=0)] = 100.0
    loss_weights: dict[str, float] = msgspec.field(default_factory=lambda: dict(MEND_LOSS_WEIGHTS))
    num_validation_cases: Annotated[int, msgspec.Meta(ge=0)] = 16  # cases kept out, to validate on
    eval_every: Annotated[int, msgspec.Meta(ge=1)] = 100
    early_stopping_patience: Annotated[int, msgspec.Meta(ge=1)] = (
        5  # validations without a better loss
    )
    save_every: Annotated[int, msgspec.Meta(ge=1)] = 100
    seed: int = 0
    prefix_cache_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30  # bytes of prefixes in memory
    prefix_disk_bytes: Annotated[int, msgspec.Meta(ge=0)] = (
        0  # bytes of prefixes on disk, in the folder
    )
