"""Qwen3-VL: as Qwen2-VL, and features of several vision layers added between decoder layers.

"Qwen3-VL Technical Report", 2025. What DeepStack (Meng et al., 2024) adds after the first layers
is recorded by the capture as `added.*` extras, so that a cut inside them is exact too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage
from torch import Tensor
from transformers import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from errata.adapters.families.base import Family, image_token, set_special_tokens
from errata.adapters.families.qwen2_vl import (
    VISION_MARKERS,
    encode_qwen_images,
    encode_qwen_video,
    forward_arguments,
    mrope_positions,
    pixel_limits,
)
from errata.adapters.families.tiny_configs import (
    HEAD_DIM,
    QWEN,
    VISION_DIM,
    TinyModel,
    TinySize,
    decoder_config,
    vision_token_ids,
)
from errata.adapters.inputs.video import fit_to_pixels
from errata.adapters.inputs.vision_inputs import (
    CHATML_PROMPT,
    ProcessorParts,
    VisionFormat,
    VisionInputs,
)
from errata.functional.errors import InvalidInputError

__all__ = ["Qwen3VLImageTextProcessor", "family", "qwen3_frames"]


def qwen3_frames(
    frames: Sequence[PILImage.Image], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Prepare frames for Qwen3-VL: the whole video is within the range of pixels.

    Args:
        frames: At least two frames of one size.
        settings: Settings of the video processor.

    Returns:
        Pixels and grid.

    Raises:
        InvalidInputError: For fewer frames than a temporal patch.
    """
    factor = settings["patch_size"] * settings["merge_size"]
    min_pixels, max_pixels = pixel_limits(settings)
    if len(frames) < settings["temporal_patch_size"]:
        raise InvalidInputError(
            f"a video for Qwen3-VL must have at least {settings['temporal_patch_size']} frames, "
            f"got {len(frames)}: pass a single frame as an image."
        )

    def fit_size(num_frames: int, height: int, width: int) -> tuple[int, int]:
        limit = max_pixels
        if settings.get("cap_pixels_per_frame"):
            cap = settings.get("max_video_tokens", 768) * factor * factor
            limit = max(min(cap, max_pixels // num_frames), int(min_pixels * 1.05)) * num_frames
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        step = settings["temporal_patch_size"]
        return fit_to_pixels(
            height, width, factor, min_pixels, limit, num_frames, round(num_frames / step) * step
        )

    return encode_qwen_video(frames, settings, fit_size)


def encode_qwen3_video(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    """Encode a video for Qwen3-VL: each temporal patch follows its time, at 24 frames a second.

    Args:
        parts: Parts of the processor.
        images: Frames.

    Returns:
        Pixels and grid, and the placeholder text.
    """
    tensors = qwen3_frames(images, parts.video_settings)
    step, rate = parts.video_settings["temporal_patch_size"], 24
    steps, high, wide = tensors["video_grid_thw"][0].tolist()
    pads = parts.processor.video_token * (high * wide // parts.video_settings["merge_size"] ** 2)
    last = len(images) - 1
    text = ""
    for index in range(steps):
        first, final = index * step, min(index * step + step - 1, last)
        text += f"<{(first + final) / 2 / rate:.1f} seconds>"
        text += f"{parts.processor.vision_start_token}{pads}{parts.processor.vision_end_token}"
    return VisionInputs(tensors, [text])


def qwen3_video_token(parts: ProcessorParts) -> str:
    # the times stand outside the markers, so the markers are written anew with each step
    """The text that stands for one video in a prompt, markers included.

    Args:
        parts: Parts of the processor.

    Returns:
        The placeholder text.
    """
    processor = parts.processor
    return f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"


class Qwen3VLImageTextProcessor(Qwen3VLProcessor):
    """`Qwen3VLProcessor` for images and text."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_: Any):
        set_special_tokens(
            self,
            tokenizer,
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tiny_qwen3_vl_config(size: TinySize) -> Any:
    import transformers as hf

    text = decoder_config(size, rope={"mrope_section": [2, 3, 3], "mrope_interleaved": True})
    return hf.Qwen3VLConfig(
        text_config={**text, "head_dim": HEAD_DIM},
        vision_config={
            "depth": 3,
            "hidden_size": VISION_DIM,
            "intermediate_size": 2 * VISION_DIM,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": size.hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.08,
        },
        **vision_token_ids(size),
    )


def _tiny_qwen3_vl_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from errata.adapters.families.qwen3_vl import Qwen3VLImageTextProcessor

    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=32 * 32,
        max_pixels=64 * 64,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLImageTextProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=QWEN
    )


family = Family(
    "qwen3_vl",
    forward_arguments=forward_arguments,
    position_ids=mrope_positions,
    vision_path="model.visual",
    projector_path="model.visual.merger",
    vision_features_path="model",
    takes_videos=True,
    title="Qwen3-VL",
    vision=VisionFormat(
        "token",
        CHATML_PROMPT,
        placeholder_wrapper=VISION_MARKERS,
        image_token=image_token,
        video_token=qwen3_video_token,
        encode_images=encode_qwen_images,
        encode_video=encode_qwen3_video,
        needs_token_types=True,
    ),
    processor=lambda: Qwen3VLImageTextProcessor,
    tiny=TinyModel(
        "Qwen3VLForConditionalGeneration", _tiny_qwen3_vl_config, _tiny_qwen3_vl_processor
    ),
)
