"""Qwen2-VL and Qwen2.5-VL: native-resolution vision, a merger, multimodal rotary positions.

Wang et al., "Qwen2-VL", 2024, and Bai et al., "Qwen2.5-VL", 2025. Tokens have three positions
(time, height, width; M-RoPE). Hugging Face keeps their offset as state on the module between
calls; here positions are computed for each batch and handed in, so that nothing leaks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from errata.functional import Inputs

from .family import Family

__all__ = ["forward_arguments", "mrope_positions", "qwen2", "qwen2_5"]

_POSITION_INPUTS = ("mm_token_type_ids",)


def forward_arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Ids, mask and pixels; token types serve the positions only."""
    del module
    vision_inputs = {
        name: value for name, value in inputs.vision_inputs.items() if name not in _POSITION_INPUTS
    }
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask.long(),
        **vision_inputs,
    }


def mrope_positions(module: Any, inputs: Inputs) -> Tensor:
    """Positions in time, height and width [B 3 L], from the module's own `get_rope_index`."""
    config = module.config
    token_types = torch.zeros_like(inputs.input_ids)
    token_types = token_types.masked_fill(inputs.input_ids == config.image_token_id, 1)
    token_types = token_types.masked_fill(inputs.input_ids == config.video_token_id, 2)
    grids = {
        name: inputs.vision_inputs[name]
        for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        if name in inputs.vision_inputs
    }
    position_ids, _ = module.model.get_rope_index(
        inputs.input_ids,
        mm_token_type_ids=token_types,
        attention_mask=inputs.attention_mask.long(),
        **grids,
    )
    return position_ids.transpose(0, 1)


def _make_family(model_type: str, **fields: Any) -> Family:
    return Family(
        model_type,
        forward_arguments=forward_arguments,
        position_ids=mrope_positions,
        vision_path="model.visual",
        projector_path="model.visual.merger",
        vision_features_path="model",
        takes_videos=True,
        **fields,
    )


qwen2: Family = _make_family("qwen2_vl")
qwen2_5: Family = _make_family("qwen2_5_vl")
