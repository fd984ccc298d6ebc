"""`LiveEditConfig` and presets."""

from __future__ import annotations

from typing import Annotated

import msgspec

from errata.functional.kinds.experts.entry import RoutingInput

__all__ = ["PRESETS", "LiveEditConfig"]


class LiveEditConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="liveedit"
):
    """Settings of LiveEdit; the default layer fits any decoder."""

    layer: Annotated[float, msgspec.Meta(ge=0, lt=1)] | int = 2 / 3  # number, or share of the depth
    feature_dim: Annotated[int, msgspec.Meta(ge=1)] = 1024  # of a slot
    num_query_tokens: Annotated[int, msgspec.Meta(ge=1)] = 4
    num_heads: Annotated[int, msgspec.Meta(ge=1)] = 8
    rank: Annotated[int, msgspec.Meta(ge=1)] = 4
    expert_scale: float = 0.2  # experts start this strong: 1 / `lora_scale` of the original
    num_answer_positions: Annotated[int, msgspec.Meta(ge=0)] = (
        0  # of answer tokens that makers tell apart
    )
    num_sentinel_tokens: Annotated[int, msgspec.Meta(ge=1)] = 32  # tokens of the sentinel picture
    num_text_sentinel_tokens: Annotated[int, msgspec.Meta(ge=1)] = (
        8  # and of its stand-in without a picture
    )
    min_self_margin: Annotated[float, msgspec.Meta(ge=0)] = (
        0.0  # how far an edit's own question passes; 0: as is
    )
    routing_input: RoutingInput = (
        "query"  # what chosen experts are weighed by; "query" is the published
    )
    margin: float = 1.0  # in training: how far experts are kept from the sentinel
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0  # experts of one row, the heaviest; 0: all chosen
    append_eos: bool = True  # teach the end of the answer too, so that free generation stops there
    weights: str = ""  # "shipped", or a file that `statefile.keep` wrote; "": untrained


PRESETS: dict[str, LiveEditConfig] = {
    "default": LiveEditConfig(),
    # configs/liveedit/*.yaml: layer 21 of 32; the sentinel is as long as the backbone's picture
    "blip2": LiveEditConfig(layer=21, num_sentinel_tokens=32, append_eos=False),
    "llava": LiveEditConfig(layer=21, num_sentinel_tokens=576, append_eos=False),
    "minigpt4": LiveEditConfig(layer=21, num_sentinel_tokens=32, append_eos=False),
    # the micro zoo's: trained states come with the package
    "micro": LiveEditConfig(
        layer=1,
        feature_dim=64,
        num_heads=4,
        rank=8,
        num_answer_positions=6,
        num_sentinel_tokens=8,
        num_text_sentinel_tokens=4,
        routing_input="query_and_vision",
        top_k=16,
        expert_scale=1.0,
        min_self_margin=4.0,
        weights="shipped",
    ),
}
