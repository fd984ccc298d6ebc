"""Qwen2-VL and Qwen2.5-VL: native-resolution vision, a merger, multimodal rotary positions.

Wang et al., "Qwen2-VL", 2024, and Bai et al., "Qwen2.5-VL", 2025. Tokens have three positions
(time, height, width; M-RoPE). Hugging Face keeps their offset as state on the module between
calls; here positions are computed for each batch and handed in, so that nothing leaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from errata.adapters.families.base import Family, image_token, set_special_tokens, video_token
from errata.adapters.families.tiny_configs import (
    QWEN,
    VISION_DIM,
    TinyModel,
    TinySize,
    decoder_config,
    vision_token_ids,
)
from errata.adapters.inputs.video import (
    fit_to_pixels,
    normalize_frames,
    patchify,
    resize_frames,
    stack_frames,
)
from errata.adapters.inputs.vision_inputs import (
    CHATML_PROMPT,
    ProcessorParts,
    VisionFormat,
    VisionInputs,
    to_tensors,
)
from errata.functional import Inputs

__all__ = [
    "Qwen2VLImageTextProcessor",
    "forward_arguments",
    "mrope_positions",
    "qwen2",
    "qwen2_5",
    "qwen2_frames",
]

_POSITION_INPUTS = ("mm_token_type_ids",)


def forward_arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Ids, mask and pixels; token types are used for positions only.

    Args:
        module: The model.
        inputs: Preprocessed rows.

    Returns:
        Keyword arguments.
    """
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
    """Positions in time, height and width, from the module's own `get_rope_index`.

    Args:
        module: The model.
        inputs: Preprocessed rows.

    Returns:
        [B 3 L].
    """
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


def pixel_limits(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The smallest and largest number of pixels that an image may be resized to.

    Args:
        settings: Settings of the image or video processor.

    Returns:
        (min_pixels, max_pixels).
    """
    size = settings["size"]
    min_pixels = settings.get("min_pixels") or size["shortest_edge"]
    return min_pixels, settings.get("max_pixels") or size["longest_edge"]


def encode_qwen_video(
    frames: Sequence[PILImage.Image],
    settings: Mapping[str, Any],
    fit_size: Callable[[int, int, int], tuple[int, int]],
) -> dict[str, Tensor]:
    """Resize, normalise and patchify frames for the Qwen families.

    Args:
        frames: Frames of one size.
        settings: Settings of the video processor.
        fit_size: Maps (frames, height, width) to the new (height, width).

    Returns:
        `pixel_values_videos` [N, C * temporal * patch * patch] and `video_grid_thw` [1 3].
    """
    video = stack_frames(frames)
    if settings.get("do_resize", True):
        new_height, new_width = fit_size(len(video), video.shape[2], video.shape[3])
        video = resize_frames(video, new_height, new_width, settings.get("resample", 3))
    rows, grid = patchify(
        normalize_frames(video, settings),
        settings["patch_size"],
        settings["merge_size"],
        settings["temporal_patch_size"],
    )
    return {
        "pixel_values_videos": rows,
        "video_grid_thw": torch.tensor([grid], dtype=torch.int64, device="cpu"),
    }


def qwen2_frames(
    frames: Sequence[PILImage.Image], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Prepare frames for Qwen2-VL and Qwen2.5-VL: each frame is within the range of pixels.

    Args:
        frames: Frames of one size.
        settings: Settings of the video processor.

    Returns:
        Pixels and grid.
    """
    factor = settings["patch_size"] * settings["merge_size"]
    min_pixels, max_pixels = pixel_limits(settings)

    def fit_size(num_frames: int, height: int, width: int) -> tuple[int, int]:
        frame_limit = max_pixels
        if settings.get("cap_pixels_per_frame"):
            budget = int(settings.get("max_video_tokens", 128_000) * factor * factor * 0.9)
            share = budget * settings["temporal_patch_size"] // num_frames
            frame_limit = max(min(max_pixels, share), int(min_pixels * 1.05))
        return fit_to_pixels(height, width, factor, min_pixels, frame_limit)

    return encode_qwen_video(frames, settings, fit_size)


# ---- Qwen-VL: as many tokens as merged patches


def encode_qwen_images(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    """Encode images for the Qwen families: one token per merged patch.

    Args:
        parts: Parts of the processor.
        images: The images of one row.

    Returns:
        Pixels and grids, and the placeholder text of each image.
    """
    tensors = to_tensors(parts.image_processor(list(images)), ["pixel_values", "image_grid_thw"])
    merged = parts.image_processor.merge_size**2
    counts = (tensors["image_grid_thw"].prod(-1) // merged).tolist()
    return VisionInputs(tensors, [parts.processor.image_token * count for count in counts])


def encode_qwen2_video(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    """Encode a video for Qwen2-VL and Qwen2.5-VL.

    Args:
        parts: Parts of the processor.
        images: Frames.

    Returns:
        Pixels and grid, and the placeholder text.
    """
    tensors = qwen2_frames(images, parts.video_settings)
    merged = parts.video_settings["merge_size"] ** 2
    count = int(tensors["video_grid_thw"].prod()) // merged
    return VisionInputs(tensors, [parts.processor.video_token * count])


VISION_MARKERS = "<|vision_start|>{}<|vision_end|>"


class Qwen2VLImageTextProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for images and text."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_: Any):
        set_special_tokens(
            self, tokenizer, image_token="<|image_pad|>", video_token="<|video_pad|>"
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tiny_qwen2_vl_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.Qwen2VLConfig(
        text_config=decoder_config(size, rope={"mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2,
            "embed_dim": VISION_DIM,
            "hidden_size": size.hidden_size,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.08,
        },
        **vision_token_ids(size),
    )


def _tiny_qwen2_5_vl_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.Qwen2_5_VLConfig(
        text_config=decoder_config(size, rope={"mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2,
            "hidden_size": VISION_DIM,
            "intermediate_size": 2 * VISION_DIM,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": size.hidden_size,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.08,
        },
        **vision_token_ids(size),
    )


def _tiny_qwen2_vl_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from errata.adapters.families.qwen2_vl import Qwen2VLImageTextProcessor

    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=64 * 64
    )
    return Qwen2VLImageTextProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=QWEN
    )


def _make_family(model_type: str, **fields: Any) -> Family:
    return Family(
        model_type,
        forward_arguments=forward_arguments,
        position_ids=mrope_positions,
        vision_path="model.visual",
        projector_path="model.visual.merger",
        vision_features_path="model",
        takes_videos=True,
        vision=VisionFormat(
            "token",
            CHATML_PROMPT,
            placeholder_wrapper=VISION_MARKERS,
            image_token=image_token,
            video_token=video_token,
            encode_images=encode_qwen_images,
            encode_video=encode_qwen2_video,
            needs_token_types=True,
        ),
        processor=lambda: Qwen2VLImageTextProcessor,
        **fields,
    )


qwen2: Family = _make_family(
    "qwen2_vl",
    title="Qwen2-VL",
    tiny=TinyModel(
        "Qwen2VLForConditionalGeneration", _tiny_qwen2_vl_config, _tiny_qwen2_vl_processor
    ),
)
qwen2_5: Family = _make_family(
    "qwen2_5_vl",
    title="Qwen2.5-VL",
    tiny=TinyModel(
        "Qwen2_5_VLForConditionalGeneration", _tiny_qwen2_5_vl_config, _tiny_qwen2_vl_processor
    ),
)
