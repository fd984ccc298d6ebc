"""How each family turns pictures into pixels, and how many tokens they take in a row.

A family is one line in `READINGS`. Pixels carry the names of the family's own forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor

from .frames import onevision_frames, qwen2_frames, qwen3_frames

__all__ = ["READINGS", "Parts", "Reading", "Seen", "parts"]


class Parts(NamedTuple):
    """What a processor is made of, by what the reader needs of it."""

    tokenizer: Any
    processor: Any  # the Hugging Face processor; None for a bare tokenizer
    images: Any  # its image processor, or None
    video: Mapping[str, Any]  # settings of the video processor
    chat: str | None  # the chat template
    config: Any  # the model's config


class Seen(NamedTuple):
    """Pictures of one row, or one video: pixels by name, and what stands for each in the row.

    `runs` has a text (written in place of the placeholder) or a number of tokens per picture.
    """

    pixels: dict[str, Tensor]
    runs: list[str] | list[int]


class Reading(NamedTuple):
    """How a family reads.

    place: "text" if a placeholder token stands in the text (and chat templates write it), "slot" if
    the reader splices ids in, "lead" if pictures come before everything, the start token included.
    """

    place: str
    raw: tuple[str, ...]  # the makers' own prompt, where there is no chat template
    picture: str = "{}"  # and what it has around each picture
    mark: str = "{}"  # what must stand around a placeholder wherever it is written
    image: Callable[[Parts], str] | None = None
    video: Callable[[Parts], str] | None = None
    pictures: Callable[[Parts, Sequence[Pictures.Image]], Seen] | None = None
    frames: Callable[[Parts, Sequence[Pictures.Image]], Seen] | None = None
    types: bool = False  # the forward wants `mm_token_type_ids`


def parts(processor: Any, config: Any) -> Parts:
    """Take a Hugging Face processor (or tokenizer) apart."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return Parts(processor, None, None, {}, getattr(processor, "chat_template", None), config)
    images = getattr(processor, "image_processor", None)
    stock: Any = getattr(processor, "video_processor", None)
    given = getattr(processor, "video_settings", None)
    if hasattr(stock, "to_dict"):
        given = stock.to_dict()
    # what a checkpoint does not say of video it says of pictures: Hugging Face falls back likewise
    video = images.to_dict() if images is not None else {}
    video |= {name: value for name, value in (given or {}).items() if value is not None}
    chat = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(chat, dict):
        chat = chat.get("default")
    return Parts(tokenizer, processor, images, video, chat, config)


def tensors(features: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """An image processor's answer as tensors; arrays of unequal length are left to the caller."""
    found = {}
    for name in names:
        value = features[name]
        if isinstance(value, (list, tuple)):
            value = np.stack([np.asarray(part) for part in value])
        found[name] = torch.as_tensor(value)
    return found


def _setting(found: Parts, name: str, default: Any = None) -> Any:
    value = getattr(found.processor, name, None)
    return getattr(found.config, name, default) if value is None else value


# ---- LLaVA: one fixed number of tokens per picture


def _llava(found: Parts, images: Sequence[Pictures.Image]) -> Seen:
    pixels = tensors(found.images(list(images)), ["pixel_values"])
    tower = found.config.vision_config
    patch = getattr(found.processor, "patch_size", None) or tower.patch_size
    extra = getattr(found.processor, "num_additional_image_tokens", None)
    if not extra:  # older checkpoints do not say; a CLIP tower has one more, its class token
        extra = int("clip" in tower.model_type)
    height, width = pixels["pixel_values"].shape[-2:]
    count = (height // patch) * (width // patch) + extra
    if _setting(found, "vision_feature_select_strategy") == "default":
        count -= 1
    return Seen(pixels, [found.processor.image_token * count] * len(images))


# ---- LLaVA-OneVision: a whole view, tiles of the best grid, a newline per row of patches


def _onevision(found: Parts, images: Sequence[Pictures.Image]) -> Seen:
    names = ["pixel_values", "image_sizes", "batch_num_images"]
    pixels = tensors(found.images([list(images)]), names)
    processor = found.processor
    square = processor.num_image_tokens or (
        (found.config.vision_config.image_size // found.config.vision_config.patch_size) ** 2
    )
    less = int(_setting(found, "vision_feature_select_strategy") == "default")
    if len(images) > 1:  # several pictures are not tiled: one view each, and a newline
        counts = [square + 1 - less] * len(images)
    else:
        height, width = pixels["pixel_values"].shape[-2:]
        size = pixels["image_sizes"][0].tolist()
        counts = [processor._get_number_of_features(*size, height, width) - less]
    return Seen(pixels, [processor.image_token * count for count in counts])


def _onevision_video(found: Parts, images: Sequence[Pictures.Image]) -> Seen:
    pixels = onevision_frames(images, found.video)
    tower = found.config.vision_config
    square = found.processor.num_image_tokens or (tower.image_size // tower.patch_size) ** 2
    side = math.ceil(math.isqrt(square) / 2)
    return Seen(pixels, [found.processor.video_token * (len(images) * side * side + 1)])


# ---- Qwen-VL: as many tokens as merged patches


def _qwen(found: Parts, images: Sequence[Pictures.Image]) -> Seen:
    pixels = tensors(found.images(list(images)), ["pixel_values", "image_grid_thw"])
    merged = found.images.merge_size**2
    counts = (pixels["image_grid_thw"].prod(-1) // merged).tolist()
    return Seen(pixels, [found.processor.image_token * count for count in counts])


def _qwen2_video(found: Parts, images: Sequence[Pictures.Image]) -> Seen:
    pixels = qwen2_frames(images, found.video)
    merged = found.video["merge_size"] ** 2
    count = int(pixels["video_grid_thw"].prod()) // merged
    return Seen(pixels, [found.processor.video_token * count])


def _qwen3_video(found: Parts, images: Sequence[Pictures.Image]) -> Seen:
    """Each pair of frames is told its time; frames that come without times run at 24 a second."""
    pixels = qwen3_frames(images, found.video)
    step, rate = found.video["temporal_patch_size"], 24
    steps, high, wide = pixels["video_grid_thw"][0].tolist()
    pads = found.processor.video_token * (high * wide // found.video["merge_size"] ** 2)
    last = len(images) - 1
    text = ""
    for index in range(steps):
        first, final = index * step, min(index * step + step - 1, last)
        text += f"<{(first + final) / 2 / rate:.1f} seconds>"
        text += f"{found.processor.vision_start_token}{pads}{found.processor.vision_end_token}"
    return Seen(pixels, [text])


def _qwen3_place(found: Parts) -> str:
    # the times stand outside the markers, so the markers are written anew with each step
    processor = found.processor
    return f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"


# ---- BLIP-2 and MiniGPT-4: as many tokens as queries


def _queries(found: Parts, images: Sequence[Pictures.Image]) -> Seen:
    pixels = tensors(found.images(list(images)), ["pixel_values"])
    return Seen(pixels, [found.config.num_query_tokens] * len(images))


def _image(found: Parts) -> str:
    return found.processor.image_token


def _video(found: Parts) -> str:
    return found.processor.video_token


_CHATML = ("<|im_start|>user\n{images}{prompt}<|im_end|>\n<|im_start|>assistant\n",)
_MARKED = "<|vision_start|>{}<|vision_end|>"

READINGS: dict[str, Reading] = {
    "llava": Reading(
        "text", ("USER: {images}{prompt} ASSISTANT:",), "{}\n", image=_image, pictures=_llava
    ),
    "llava_onevision": Reading(
        "text", _CHATML, "{}\n", image=_image, video=_video, pictures=_onevision,
        frames=_onevision_video,
    ),
    "qwen2_vl": Reading(
        "text", _CHATML, mark=_MARKED, image=_image, video=_video, pictures=_qwen,
        frames=_qwen2_video, types=True,
    ),
    "qwen2_5_vl": Reading(
        "text", _CHATML, mark=_MARKED, image=_image, video=_video, pictures=_qwen,
        frames=_qwen2_video, types=True,
    ),
    "qwen3_vl": Reading(
        "text", _CHATML, mark=_MARKED, image=_image, video=_qwen3_place, pictures=_qwen,
        frames=_qwen3_video, types=True,
    ),
    "blip-2": Reading("lead", ("Question: {prompt} Answer:",), pictures=_queries),
    "minigpt4": Reading(
        "slot", ("###Human: {images}{prompt}###Assistant:",), "<Img>{}</Img> ", pictures=_queries
    ),
}  # fmt: skip

TEXT = Reading("text", ("{prompt}",))
"""A decoder without pictures."""
