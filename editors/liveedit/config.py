"""`LiveEditConfig` and presets."""

from __future__ import annotations

from typing import Annotated

import msgspec

from errata.editors.common.settings import AppendEos, LayerChoice, Untrained, Weights
from errata.functional.kinds.experts.entry import RoutingInput

__all__ = ["PRESETS", "LiveEditConfig"]


MAX_SIZE = 1 << 20


class LiveEditConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="liveedit"
):
    """Settings of LiveEdit; the default layer fits any decoder."""

    layer: LayerChoice = 2 / 3
    feature_dim: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Width of a routing feature.",
        ),
    ] = 1024
    num_query_tokens: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Learned query tokens of each feature network.",
        ),
    ] = 4
    num_heads: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Attention heads of the feature networks.",
        ),
    ] = 8
    rank: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=MAX_SIZE,
            description="Rank of an expert.",
        ),
    ] = 4
    expert_scale: Annotated[
        float,
        msgspec.Meta(
            description="Scale of a new expert's output: 1 / `lora_scale` of the original."
        ),
    ] = 0.2
    num_answer_positions: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="Answer positions that the generator distinguishes. 0: none."
        ),
    ] = 0
    num_sentinel_tokens: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1 << 20,
            description="Tokens of the sentinel image, which no edit should match.",
        ),
    ] = 32
    num_text_sentinel_tokens: Annotated[
        int,
        msgspec.Meta(
            ge=1, le=MAX_SIZE, description="Tokens of the sentinel for rows without an image."
        ),
    ] = 8
    min_self_margin: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            description="Margin by which an edit's own question must pass the gate; the key is "
            "scaled to it. 0: keys as generated.",
        ),
    ] = 0.0
    routing_input: Annotated[
        RoutingInput,
        msgspec.Meta(
            description='Features that weigh the chosen experts: "query" as published, or '
            '"query_and_vision".'
        ),
    ] = "query"
    margin: Annotated[
        float,
        msgspec.Meta(description="Margin between experts and the sentinel in the training loss."),
    ] = 1.0
    top_k: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="Experts of one row, at most, by weight. 0: all that pass the gate."
        ),
    ] = 0
    append_eos: AppendEos = True
    weights: Weights = ""
    untrained: Untrained = False


PRESETS: dict[str, LiveEditConfig] = {
    "default": LiveEditConfig(),
    # configs/liveedit/*.yaml: layer 21 of 32; the sentinel is as long as the backbone's image
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
