"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama decoder; features replace placeholders.

Liu et al., "Improved Baselines with Visual Instruction Tuning", 2024;
`LlavaForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image as PILImage

from errata.adapters.families.base import Family, image_token
from errata.adapters.families.tiny_configs import (
    VICUNA,
    VISION_DIM,
    TinyModel,
    TinySize,
    decoder_config,
    tower_config,
)
from errata.adapters.inputs.vision_inputs import (
    ProcessorParts,
    VisionFormat,
    VisionInputs,
    find_setting,
    to_tensors,
)

__all__ = ["family"]


# ---- LLaVA: one fixed number of tokens per image


def encode_llava_images(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    """Encode images for LLaVA: a fixed number of tokens each.

    Args:
        parts: Parts of the processor.
        images: The images of one row.

    Returns:
        Pixels, and the placeholder text of each image.
    """
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


def _tiny_llava_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower_config(16, 48), projection_dim=VISION_DIM),
        text_config=hf.LlamaConfig(**decoder_config(size)),
        image_token_index=size.token_id("<image>"),
        image_seq_length=9,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


# ---- processors


def _tiny_llava_processor(tokenizer: Any) -> Any:
    import transformers as hf

    square = {"height": 48, "width": 48}
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def _processor_class() -> type:
    from transformers import LlavaProcessor

    return LlavaProcessor


family = Family(
    "llava",
    vision_path="model.vision_tower",
    projector_path="model.multi_modal_projector",
    vision_features_path="model",
    title="LLaVA-1.5",
    vision=VisionFormat(
        placement="token",
        # for checkpoints without a chat template, and templates with chat=False and no text
        raw_template=("USER: {images}{prompt} ASSISTANT:",),
        image_wrapper="{}\n",
        image_token=image_token,
        encode_images=encode_llava_images,
    ),
    processor=_processor_class,
    tiny=TinyModel(
        "LlavaForConditionalGeneration", _tiny_llava_config, _tiny_llava_processor, add_bos=True
    ),
)
