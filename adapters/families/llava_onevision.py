"""LLaVA-OneVision: a SigLIP tower over tiles of an image, a projector, a Qwen2 decoder.

Li et al., "LLaVA-OneVision: Easy Visual Task Transfer", 2024;
`LlavaOnevisionForConditionalGeneration`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage
from torch import Tensor
from transformers import LlavaOnevisionProcessor
from transformers.processing_utils import ProcessorMixin

from errata.adapters.families.base import Family, image_token, set_special_tokens, video_token
from errata.adapters.families.tiny_configs import (
    CHATML,
    TinyModel,
    TinySize,
    decoder_config,
    tower_config,
)
from errata.adapters.inputs.video import normalize_frames, resize_frames, stack_frames
from errata.adapters.inputs.vision_inputs import (
    CHATML_PROMPT,
    ProcessorParts,
    VisionFormat,
    VisionInputs,
    find_setting,
    to_tensors,
)

__all__ = ["LlavaOnevisionImageTextProcessor", "family", "onevision_frames"]


def onevision_frames(
    frames: Sequence[PILImage.Image], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Prepare frames for LLaVA-OneVision: each is resized to the vision tower's size.

    Args:
        frames: F frames of one size.
        settings: Settings of the video processor.

    Returns:
        `pixel_values_videos` [1 F C H W].
    """
    video = stack_frames(frames)
    if settings.get("do_resize", True):
        size = settings["size"]
        new_height = size.get("height") or size["shortest_edge"]
        new_width = size.get("width") or size["shortest_edge"]
        video = resize_frames(video, new_height, new_width, settings.get("resample", 3))
    return {"pixel_values_videos": normalize_frames(video, settings)[None]}


# ---- LLaVA-OneVision: a whole view, tiles of the best grid, a newline per row of patches


def encode_onevision_images(
    parts: ProcessorParts, images: Sequence[PILImage.Image]
) -> VisionInputs:
    """Encode images for LLaVA-OneVision: a single image is tiled, several get one view each.

    Args:
        parts: Parts of the processor.
        images: The images of one row.

    Returns:
        Pixels, and the placeholder text of each image.
    """
    names = ["pixel_values", "image_sizes", "batch_num_images"]
    tensors = to_tensors(parts.image_processor([list(images)]), names)
    processor = parts.processor
    square = processor.num_image_tokens or (
        (parts.config.vision_config.image_size // parts.config.vision_config.patch_size) ** 2
    )
    less = int(find_setting(parts, "vision_feature_select_strategy") == "default")
    if len(images) > 1:  # several images are not tiled: one view each, and a newline
        counts = [square + 1 - less] * len(images)
    else:
        height, width = tensors["pixel_values"].shape[-2:]
        size = tensors["image_sizes"][0].tolist()
        counts = [processor._get_number_of_features(*size, height, width) - less]
    return VisionInputs(tensors, [processor.image_token * count for count in counts])


def encode_onevision_video(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    """Encode a video for LLaVA-OneVision.

    Args:
        parts: Parts of the processor.
        images: Frames.

    Returns:
        Pixels, and the placeholder text.
    """
    tensors = onevision_frames(images, parts.video_settings)
    tower = parts.config.vision_config
    square = parts.processor.num_image_tokens or (tower.image_size // tower.patch_size) ** 2
    side = math.ceil(math.isqrt(square) / 2)
    return VisionInputs(tensors, [parts.processor.video_token * (len(images) * side * side + 1)])


class LlavaOnevisionImageTextProcessor(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` for images and text."""

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


def _tiny_onevision_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**tower_config(16, 32), vision_use_head=False),
        text_config=hf.Qwen2Config(**decoder_config(size)),
        image_token_index=size.token_id("<image>"),
        video_token_index=size.token_id("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
        tie_word_embeddings=False,
    )


def _tiny_onevision_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from errata.adapters.families.llava_onevision import LlavaOnevisionImageTextProcessor

    images = hf.LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
    )
    return LlavaOnevisionImageTextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>").replace("VIDEO", "<video>"),
    )


family = Family(
    "llava_onevision",
    vision_path="model.vision_tower",
    projector_path="model.multi_modal_projector",
    vision_features_path="model",
    takes_videos=True,
    known_attributes=frozenset({"use_image_newline_parameter"}),
    required_values={"use_image_newline_parameter": (None, True)},
    title="LLaVA-OneVision",
    vision=VisionFormat(
        "token",
        CHATML_PROMPT,
        "{}\n",
        image_token=image_token,
        video_token=video_token,
        encode_images=encode_onevision_images,
        encode_video=encode_onevision_video,
    ),
    processor=lambda: LlavaOnevisionImageTextProcessor,
    tiny=TinyModel(
        "LlavaOnevisionForConditionalGeneration", _tiny_onevision_config, _tiny_onevision_processor
    ),
)
