"""How each family turns pictures into pixels, and how many tokens they take in a row.

A family is one line in `READINGS`. Pixels carry the names of the family's own forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from .frames import onevision_frames, qwen2_frames, qwen3_frames

__all__ = ["READINGS", "ProcessorParts", "VisionFormat", "VisionInputs", "split_processor"]


class ProcessorParts(NamedTuple):
    """What a processor is made of, by what the reader needs of it."""

    tokenizer: Any
    processor: Any  # the Hugging Face processor; None for a bare tokenizer
    image_processor: Any  # its image processor, or None
    video_settings: Mapping[str, Any]  # settings of the video processor
    chat_template: str | None  # the chat template
    config: Any  # the model's config


class VisionInputs(NamedTuple):
    """Pictures of one row, or one video: pixels by name, and what stands for each in the row.

    `runs` has a text (written in place of the placeholder) or a number of tokens per picture.
    """

    tensors: dict[str, Tensor]
    placeholder_runs: list[str] | list[int]


class VisionFormat(NamedTuple):
    """How a family reads.

    place: "token" if a placeholder token stands in the text (and chat templates write it), "inserted_ids" if
    the reader splices ids in, "prefix" if pictures come before everything, the start token included.
    """

    placement: str
    raw_template: tuple[str, ...]  # the makers' own prompt, where there is no chat template
    image_wrapper: str = "{}"  # and what it has around each picture
    placeholder_wrapper: str = "{}"  # what must stand around a placeholder wherever it is written
    image_token: Callable[[ProcessorParts], str] | None = None
    video_token: Callable[[ProcessorParts], str] | None = None
    encode_images: Callable[[ProcessorParts, Sequence[PILImage.Image]], VisionInputs] | None = None
    encode_video: Callable[[ProcessorParts, Sequence[PILImage.Image]], VisionInputs] | None = None
    needs_token_types: bool = False  # the forward wants `mm_token_type_ids`


def split_processor(processor: Any, config: Any) -> ProcessorParts:
    """Take a Hugging Face processor (or tokenizer) apart."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return ProcessorParts(
            processor, None, None, {}, getattr(processor, "chat_template", None), config
        )
    image_processor = getattr(processor, "image_processor", None)
    video_processor: Any = getattr(processor, "video_processor", None)
    own_settings = getattr(processor, "video_settings", None)
    if hasattr(video_processor, "to_dict"):
        own_settings = video_processor.to_dict()
    # what a checkpoint does not say of video it says of pictures: Hugging Face falls back likewise
    video_settings = image_processor.to_dict() if image_processor is not None else {}
    video_settings |= {
        name: value for name, value in (own_settings or {}).items() if value is not None
    }
    chat_template = getattr(processor, "chat_template", None) or getattr(
        tokenizer, "chat_template", None
    )
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    return ProcessorParts(
        tokenizer, processor, image_processor, video_settings, chat_template, config
    )


def to_tensors(features: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """An image processor's answer as tensors; arrays of unequal length are left to the caller."""
    converted = {}
    for name in names:
        value = features[name]
        if isinstance(value, (list, tuple)):
            value = np.stack([np.asarray(part) for part in value])
        converted[name] = torch.as_tensor(value)
    return converted


def find_setting(parts: ProcessorParts, name: str, default: Any = None) -> Any:
    value = getattr(parts.processor, name, None)
    return getattr(parts.config, name, default) if value is None else value


# ---- LLaVA: one fixed number of tokens per picture


def encode_llava_images(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    tensors = to_tensors(parts.image_processor(list(images)), ["pixel_values"])
    tower = parts.config.vision_config
    patch = getattr(parts.processor, "patch_size", None) or tower.patch_size
    extra = getattr(parts.processor, "num_additional_image_tokens", None)
    if not extra:  # older checkpoints do not say; a CLIP tower has one more, its class token
        extra = int("clip" in tower.model_type)
    height, width = tensors["pixel_values"].shape[-2:]
    count = (height // patch) * (width // patch) + extra
    if find_setting(parts, "vision_feature_select_strategy") == "default":
        count -= 1
    return VisionInputs(tensors, [parts.processor.image_token * count] * len(images))


# ---- LLaVA-OneVision: a whole view, tiles of the best grid, a newline per row of patches


def encode_onevision_images(
    parts: ProcessorParts, images: Sequence[PILImage.Image]
) -> VisionInputs:
    names = ["pixel_values", "image_sizes", "batch_num_images"]
    tensors = to_tensors(parts.image_processor([list(images)]), names)
    processor = parts.processor
    square = processor.num_image_tokens or (
        (parts.config.vision_config.image_size // parts.config.vision_config.patch_size) ** 2
    )
    less = int(find_setting(parts, "vision_feature_select_strategy") == "default")
    if len(images) > 1:  # several pictures are not tiled: one view each, and a newline
        counts = [square + 1 - less] * len(images)
    else:
        height, width = tensors["pixel_values"].shape[-2:]
        size = tensors["image_sizes"][0].tolist()
        counts = [processor._get_number_of_features(*size, height, width) - less]
    return VisionInputs(tensors, [processor.image_token * count for count in counts])


def encode_onevision_video(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    tensors = onevision_frames(images, parts.video_settings)
    tower = parts.config.vision_config
    square = parts.processor.num_image_tokens or (tower.image_size // tower.patch_size) ** 2
    side = math.ceil(math.isqrt(square) / 2)
    return VisionInputs(tensors, [parts.processor.video_token * (len(images) * side * side + 1)])


# ---- Qwen-VL: as many tokens as merged patches


def encode_qwen_images(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    tensors = to_tensors(parts.image_processor(list(images)), ["pixel_values", "image_grid_thw"])
    merged = parts.image_processor.merge_size**2
    counts = (tensors["image_grid_thw"].prod(-1) // merged).tolist()
    return VisionInputs(tensors, [parts.processor.image_token * count for count in counts])


def encode_qwen2_video(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    tensors = qwen2_frames(images, parts.video_settings)
    merged = parts.video_settings["merge_size"] ** 2
    count = int(tensors["video_grid_thw"].prod()) // merged
    return VisionInputs(tensors, [parts.processor.video_token * count])


def encode_qwen3_video(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    """Each pair of frames is told its time; frames that come without times run at 24 a second."""
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
    processor = parts.processor
    return f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"


# ---- BLIP-2 and MiniGPT-4: as many tokens as queries


def encode_qformer_images(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    tensors = to_tensors(parts.image_processor(list(images)), ["pixel_values"])
    return VisionInputs(tensors, [parts.config.num_query_tokens] * len(images))


def image_token(parts: ProcessorParts) -> str:
    return parts.processor.image_token


def video_token(parts: ProcessorParts) -> str:
    return parts.processor.video_token


CHATML_PROMPT = ("<|im_start|>user\n{images}{prompt}<|im_end|>\n<|im_start|>assistant\n",)
VISION_MARKERS = "<|vision_start|>{}<|vision_end|>"

READINGS: dict[str, VisionFormat] = {
    "llava": VisionFormat(
        "token",
        ("USER: {images}{prompt} ASSISTANT:",),
        "{}\n",
        image_token=image_token,
        encode_images=encode_llava_images,
    ),
    "llava_onevision": VisionFormat(
        "token",
        CHATML_PROMPT,
        "{}\n",
        image_token=image_token,
        video_token=video_token,
        encode_images=encode_onevision_images,
        encode_video=encode_onevision_video,
    ),
    "qwen2_vl": VisionFormat(
        "token",
        CHATML_PROMPT,
        placeholder_wrapper=VISION_MARKERS,
        image_token=image_token,
        video_token=video_token,
        encode_images=encode_qwen_images,
        encode_video=encode_qwen2_video,
        needs_token_types=True,
    ),
    "qwen2_5_vl": VisionFormat(
        "token",
        CHATML_PROMPT,
        placeholder_wrapper=VISION_MARKERS,
        image_token=image_token,
        video_token=video_token,
        encode_images=encode_qwen_images,
        encode_video=encode_qwen2_video,
        needs_token_types=True,
    ),
    "qwen3_vl": VisionFormat(
        "token",
        CHATML_PROMPT,
        placeholder_wrapper=VISION_MARKERS,
        image_token=image_token,
        video_token=qwen3_video_token,
        encode_images=encode_qwen_images,
        encode_video=encode_qwen3_video,
        needs_token_types=True,
    ),
    "blip-2": VisionFormat(
        "prefix", ("Question: {prompt} Answer:",), encode_images=encode_qformer_images
    ),
    "minigpt4": VisionFormat(
        "inserted_ids",
        ("###Human: {images}{prompt}###Assistant:",),
        "<Img>{}</Img> ",
        encode_images=encode_qformer_images,
    ),
}

TEXT_ONLY = VisionFormat("token", ("{prompt}",))
"""A decoder without pictures."""
