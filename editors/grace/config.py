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

    site: Annotated[
        str, msgspec.Meta(description="A linear map of the layer, by its site name.")
    ] = "mlp.down"
    layer: Annotated[
        Annotated[float, msgspec.Meta(ge=0, lt=1)] | int,
        msgspec.Meta(
            description="Decoder layer: a number (negative from the end), or a fraction of the "
            "depth."
        ),
    ] = 2 / 3
    replacement: Annotated[
        Replacement,
        msgspec.Meta(
            description='Tokens whose output a value replaces: "last" of the prompt, all of '
            'the "prompt", or "all".'
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
    lr: Annotated[float, msgspec.Meta(gt=0, description="Learning rate.")] = 5.0
    num_steps: Annotated[int, msgspec.Meta(ge=1, description="Optimization steps, at most.")] = 200
    stop_loss: Annotated[
        float,
        msgspec.Meta(
            ge=0, description="Loss in nats per token below which an edit stops. 0: never."
        ),
    ] = 1e-2
    append_eos: Annotated[
        bool,
        msgspec.Meta(
            description="Whether the token that ends an answer is taught too, so that free "
            "generation stops there."
        ),
    ] = True


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
