"""`GraceConfig` and presets."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from errata.editors.common.settings import (
    AppendEos,
    LayerChoice,
    LearningRate,
    LinearMap,
    NumSteps,
    StopLoss,
)
from errata.functional.kinds.codebook.entry import Replacement

__all__ = ["PRESETS", "GraceConfig"]


class GraceConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="grace"
):
    """Settings of GRACE; the default layer fits any decoder."""

    site: LinearMap = "mlp.down"
    layer: LayerChoice = 2 / 3
    replacement: Annotated[
        Replacement,
        msgspec.Meta(
            description='Tokens whose output a value replaces: "last" of the prompt, the tokens '
            'before it ("prompt"), or both ("all").'
        ),
    ] = "last"
    radius: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            description="Radius of a new key, in units of the map's input (Euclidean distance).",
        ),
    ] = 1.0
    value_init: Annotated[
        Literal["cold", "warm"],
        msgspec.Meta(
            description='Start of a value: "cold" from U[0, 1), "warm" from the map\'s own output.'
        ),
    ] = "cold"
    lr: LearningRate = 5.0
    num_steps: NumSteps = 200
    stop_loss: StopLoss = 1e-2
    append_eos: AppendEos = True


PRESETS: dict[str, GraceConfig] = {
    # the micro zoo's four layers: three above the value say a two-token answer that two cannot
    "micro": GraceConfig(layer=0, lr=10.0, num_steps=100),
    # EasyEdit's yaml: `layers[18].mlp.down_proj` for LLaVA-OneVision and Qwen2-VL, 23 for Qwen3-VL.
    "easyedit": GraceConfig(layer=18, lr=1.0, num_steps=20, stop_loss=0.0, append_eos=False),
    "easyedit-qwen3-vl": GraceConfig(
        layer=23, lr=1.0, num_steps=20, stop_loss=0.0, append_eos=False
    ),
    "grace-original": GraceConfig(
        replacement="prompt", lr=1.0, num_steps=100, stop_loss=0.0, append_eos=False
    ),
}
