"""How each family turns images into pixels, and how many tokens they take in a row.

A family's record (`Family.vision`) says which. Pixels carry the names of the family's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

__all__ = ["ProcessorParts", "VisionFormat", "VisionInputs", "split_processor"]


class ProcessorParts(NamedTuple):
    """What a processor is made of, by what the reader needs of it."""

    tokenizer: Any
    processor: Any  # the Hugging Face processor; None for a bare tokenizer
    image_processor: Any  # its image processor, or None
    video_settings: Mapping[str, Any]  # settings of the video processor
    chat_template: str | None  # the chat template
    config: Any  # the model's config


class VisionInputs(NamedTuple):
    """Images of one row, or one video: pixels by name, and what stands for each in the row.

    `placeholder_runs` has a text (written in place of the placeholder) or a number of tokens per
    image.
    """

    tensors: dict[str, Tensor]
    placeholder_runs: list[str] | list[int]


class VisionFormat(NamedTuple):
    """How a family reads.

    `placement` is "token" if a placeholder token stands in the text (and chat templates write it),
    "inserted_ids" if the reader splices ids in, "prefix" if images come before everything, the
    start token included.
    """

    placement: str
    raw_template: tuple[str, ...]  # the makers' own prompt, where there is no chat template
    image_wrapper: str = "{}"  # and what it has around each image
    placeholder_wrapper: str = "{}"  # what must stand around a placeholder wherever it is written
    image_token: Callable[[ProcessorParts], str] | None = None
    video_token: Callable[[ProcessorParts], str] | None = None
    encode_images: Callable[[ProcessorParts, Sequence[PILImage.Image]], VisionInputs] | None = None
    encode_video: Callable[[ProcessorParts, Sequence[PILImage.Image]], VisionInputs] | None = None
    needs_token_types: bool = False  # the forward wants `mm_token_type_ids`


def split_processor(processor: Any, config: Any) -> ProcessorParts:
    """Take a Hugging Face processor (or tokenizer) apart.

    Args:
        processor: The processor.
        config: The model's config.

    Returns:
        Its parts.
    """
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
    # what a checkpoint does not say of video it says of images: Hugging Face falls back likewise
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
    """Convert an image processor's output to tensors; ragged arrays must not be named.

    Args:
        features: Output by name.
        names: Names to convert.

    Returns:
        Tensors by name.
    """
    converted = {}
    for name in names:
        value = features[name]
        if isinstance(value, (list, tuple)):
            value = np.stack([np.asarray(part) for part in value])
        converted[name] = torch.as_tensor(value, device="cpu")
    return converted


def find_setting(parts: ProcessorParts, name: str, default: Any = None) -> Any:
    """Look a setting up in the processor, then in the config.

    Args:
        parts: Parts of the processor.
        name: Name of the setting.
        default: Value if neither has it.

    Returns:
        The value.
    """
    value = getattr(parts.processor, name, None)
    return getattr(parts.config, name, default) if value is None else value


CHATML_PROMPT = ("<|im_start|>user\n{images}{prompt}<|im_end|>\n<|im_start|>assistant\n",)


TEXT_ONLY = VisionFormat("token", ("{prompt}",))
"""A decoder without images."""
