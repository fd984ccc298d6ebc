"""`MendConfig`, presets, published training settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from errata.editors.common.settings import Untrained, Weights
from errata.editors.training.config import TrainingConfig

__all__ = ["PRESETS", "TRAINING", "MendConfig"]


class MendConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mend"):
    """Settings of MEND; `edit_lr` is where alpha starts: below zero an untrained MEND descends."""

    sites: Annotated[
        tuple[str, ...],
        msgspec.Meta(min_length=1, description="Sites whose linear maps are edited."),
    ] = (
        "layers.-3.mlp",
        "layers.-2.mlp",
        "layers.-1.mlp",
    )
    rank: Annotated[
        int, msgspec.Meta(ge=1, le=1 << 20, description="Rank of the network's low-rank layers.")
    ] = 1920
    num_hidden_layers: Annotated[
        int, msgspec.Meta(ge=0, description="Hidden layers of the network.")
    ] = 1
    combine: Annotated[
        bool,
        msgspec.Meta(
            description="Whether inputs and output gradients pass through one network together."
        ),
    ] = True
    edit_lr: Annotated[
        float,
        msgspec.Meta(
            description="Initial learned step size of each map. Below zero an untrained MEND "
            "descends."
        ),
    ] = 1e-4
    append_eos: Annotated[
        bool,
        msgspec.Meta(
            description="Whether the token that ends an answer is part of the edit's loss."
        ),
    ] = False
    weights: Weights = ""
    untrained: Untrained = False


def _mlp_sites(*numbers: int, parts: Sequence[str] = ("up", "down")) -> tuple[str, ...]:
    return tuple(f"layers.{number}.mlp.{part}" for number in numbers for part in parts)


PRESETS: dict[str, MendConfig] = {
    "default": MendConfig(),
    # EasyEdit's yaml: layers 29 to 31 of 32 (BLIP-2, MiniGPT-4), 25 to 27 of 28 (LLaVA-OneVision,
    # Qwen2-VL), fc1 and fc2 or up and down; the same numbers for Qwen3-VL-4B, of 36.
    "easyedit": MendConfig(sites=_mlp_sites(-3, -2, -1)),
    "easyedit-qwen3-vl": MendConfig(sites=_mlp_sites(25, 26, 27)),
    # LiveEdit's: the gate too, where there is one
    "liveedit": MendConfig(),
    # the micro zoo's: trained states come with the package
    "micro": MendConfig(
        sites=("layers.-2.mlp", "layers.-1.mlp"),
        rank=16,
        edit_lr=-3e-3,
        append_eos=True,
        weights="shipped",
    ),
    "untrained": MendConfig(edit_lr=-1e-2, untrained=True),
}

TRAINING: dict[str, TrainingConfig] = {
    # EasyEdit's and VLKEB's: one case at a time, two of them a step
    "easyedit": TrainingConfig(
        num_steps=30_000,
        batch_size=1,
        gradient_accumulation_steps=2,
        lr=1e-6,
        lr_by_group={"edit_lrs": 1e-4},
        max_grad_norm=100.0,
        eval_every=5000,
        num_validation_cases=500,
    ),
}
