"""Processors that Hugging Face can not build without torchvision.

`Qwen2VLProcessor`, `Qwen3VLProcessor` and `LlavaOnevisionProcessor` demand a video processor, and
that needs torchvision. These subclasses leave it out: pictures, text and chat templates go through
the stock code, and video frames are read by `frames.py`. Any other family's stock class is given a
video processor that can do nothing (`stock`), which is enough for pictures.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Blip2Processor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin

from .minigpt4 import MiniGPT4Processor

__all__ = [
    "OURS",
    "LlavaOnevisionImageTextProcessor",
    "Qwen2VLImageTextProcessor",
    "Qwen3VLImageTextProcessor",
    "build_hf_processor",
]


def set_special_tokens(processor: Any, tokenizer: Any, **default: str) -> None:
    for name, token in default.items():
        token = getattr(tokenizer, name, None) or token
        setattr(processor, name, token)
        setattr(processor, f"{name}_id", tokenizer.convert_tokens_to_ids(token))


class Qwen2VLImageTextProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for pictures and text."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_: Any):
        set_special_tokens(
            self, tokenizer, image_token="<|image_pad|>", video_token="<|video_pad|>"
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen3VLImageTextProcessor(Qwen3VLProcessor):
    """`Qwen3VLProcessor` for pictures and text."""

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


class LlavaOnevisionImageTextProcessor(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` for pictures and text."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        **_: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        set_special_tokens(self, tokenizer, image_token=image_token, video_token=video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


OURS: dict[str, Any] = {
    "llava": LlavaProcessor,
    "llava_onevision": LlavaOnevisionImageTextProcessor,
    "qwen2_vl": Qwen2VLImageTextProcessor,
    "qwen2_5_vl": Qwen2VLImageTextProcessor,
    "qwen3_vl": Qwen3VLImageTextProcessor,
    "blip-2": Blip2Processor,
    "minigpt4": MiniGPT4Processor,
}
"""The processor of each family that has an adapter of its own, put together from its parts."""


class _WithoutVideoProcessor:
    """Lets a processor be built around a video processor that is none."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]


def build_hf_processor(name: str, config: Any, settings: dict[str, Any], **hub_options: Any) -> Any:
    """The processor that Hugging Face has for a checkpoint's model type.

    Where it wants a video processor, which needs torchvision, one that can do nothing stands in:
    pictures and text need none, and families found by structure are asked about no videos.
    """
    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None or set(processor_class.get_attributes()) != {
        "image_processor",
        "tokenizer",
        "video_processor",
    }:
        return AutoProcessor.from_pretrained(name, **hub_options)
    return type(
        processor_class.__name__,
        (_WithoutVideoProcessor, processor_class),
        {"__init__": processor_class.__init__},
    )(
        image_processor=AutoImageProcessor.from_pretrained(name, backend="pil", **hub_options),
        tokenizer=AutoTokenizer.from_pretrained(name, **hub_options),
        video_processor=SimpleNamespace(),
        **settings,
    )
