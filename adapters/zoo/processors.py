"""Processors of two families without their video half, which can not be built without torchvision.

Both subclass the stock class and skip its `__init__`, whose signature would demand a video
processor; pictures, text and chat templates are handled by the stock code.
"""

from typing import Any

from transformers import LlavaOnevisionProcessor, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin


class Qwen2VLPictures(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for pictures and text."""

    def __init__(self, image_processor=None, tokenizer: Any = None, chat_template=None, **_: Any):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class LlavaOnevisionPictures(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` for pictures and text."""

    def __init__(
        self,
        image_processor=None,
        tokenizer: Any = None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        vision_aspect_ratio="anyres_max_9",
        **_: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
