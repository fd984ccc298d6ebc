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

__all__ = ["arguments", "positions", "qwen2", "qwen2_5"]

_COMPUTED = ("mm_token_type_ids",)


def arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Ids, mask and pixels; token types serve the positions only."""
    del module
    pixels = {name: value for name, value in inputs.pixels.items() if name not in _COMPUTED}
    return {"input_ids": inputs.ids, "attention_mask": inputs.mask.long(), **pixels}


def positions(module: Any, inputs: Inputs) -> Tensor:
    """Positions in time, height and width [B 3 L], from the module's own `get_rope_index`."""
    config = module.config
    kinds = torch.zeros_like(inputs.ids)
    kinds = kinds.masked_fill(inputs.ids == config.image_token_id, 1)
    kinds = kinds.masked_fill(inputs.ids == config.video_token_id, 2)
    grids = {
        name: inputs.pixels[name]
        for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        if name in inputs.pixels
    }
    places, _ = module.model.get_rope_index(
        inputs.ids, mm_token_type_ids=kinds, attention_mask=inputs.mask.long(), **grids
    )
    return places.transpose(0, 1)


def _family(model_type: str, **more: Any) -> Family:
    return Family(
        model_type,
        arguments=arguments,
        positions=positions,
        vision="model.visual",
        projector="model.visual.merger",
        features="model",
        videos=True,
        **more,
    )


qwen2: Family = _family("qwen2_vl")
qwen2_5: Family = _family("qwen2_5_vl")
