"""`GraceConfig` and presets."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from errata.functional.kinds.codebook.entry import Replacement

__all__ = ["PRESETS", "GraceConfig"]


class GraceConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="grace"
):
    """Settings of GRACE; the default layer fits any decoder."""

    site: str = "mlp.down"  # a linear map of a layer
    layer: Annotated[float, msgspec.Meta(ge=0, lt=1)] | int = 2 / 3  # number, or share of the depth
    replacement: Replacement = "last"  # the tokens that a value replaces
    radius: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    value_init: Literal["cold", "warm"] = "cold"  # values from U[0, 1), or from the map's output
    lr: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    num_steps: Annotated[int, msgspec.Meta(ge=1)] = 200
    stop_loss: Annotated[float, msgspec.Meta(ge=0)] = 1e-2  # an edit stops below it; 0: never
    append_eos: bool = True  # teach the end of the answer too, so that free generation stops there


PRESETS: dict[str, GraceConfig] = {
    # the micro zoo's four layers: three above the value say a two-token answer that two can not
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
