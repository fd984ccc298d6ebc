"""The one table of families: `config.model_type` -> how to run it, or why it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Blip2Processor, LlavaProcessor

from errata.adapters.families import blip2, llava, llava_onevision, qwen2_vl, qwen3_vl, text_only
from errata.adapters.families.base import Family, image_token, video_token
from errata.adapters.families.blip2 import (
    _tiny_blip2_config,
    _tiny_blip2_processor,
    encode_qformer_images,
)
from errata.adapters.families.llava import (
    _tiny_llava_config,
    _tiny_llava_processor,
    encode_llava_images,
)
from errata.adapters.families.llava_onevision import (
    LlavaOnevisionImageTextProcessor,
    _tiny_onevision_config,
    _tiny_onevision_processor,
    encode_onevision_images,
    encode_onevision_video,
)
from errata.adapters.families.minigpt4 import (
    MiniGPT4Processor,
    _tiny_minigpt4_config,
    _tiny_minigpt4_processor,
)
from errata.adapters.families.qwen2_vl import (
    VISION_MARKERS,
    Qwen2VLImageTextProcessor,
    _tiny_qwen2_5_vl_config,
    _tiny_qwen2_vl_config,
    _tiny_qwen2_vl_processor,
    encode_qwen2_video,
    encode_qwen_images,
)
from errata.adapters.families.qwen3_vl import (
    Qwen3VLImageTextProcessor,
    _tiny_qwen3_vl_config,
    _tiny_qwen3_vl_processor,
    encode_qwen3_video,
    qwen3_video_token,
)
from errata.adapters.families.text_only import (
    _tiny_gpt2_config,
    _tiny_llama_config,
    _tiny_qwen2_config,
    _use_tokenizer,
)
from errata.adapters.families.tiny_configs import TinyModel
from errata.adapters.families.unlisted import generic
from errata.adapters.inputs.vision_inputs import CHATML_PROMPT, VisionFormat
from errata.functional.errors import UnsupportedModelError

__all__ = ["FAMILIES", "OURS", "READINGS", "REFUSED", "TINY", "family_of", "list_families"]

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        blip2.family,
        blip2.minigpt4,
        llava.family,
        llava_onevision.family,
        qwen2_vl.qwen2,
        qwen2_vl.qwen2_5,
        qwen3_vl.family,
        text_only.gpt2,
        text_only.llama,
        text_only.qwen2,
        text_only.qwen3,
        text_only.opt,
    )
}

_ENCODER_DECODER = "it is an encoder-decoder: its layers read an encoder's states beside the stream"

REFUSED: Mapping[str, str] = {
    "t5": _ENCODER_DECODER,
    "bart": _ENCODER_DECODER,
    "florence2": _ENCODER_DECODER,
    "mllama": "its cross-attention layers read vision states beside the stream, and are skipped "
    "where there is no picture",
    "gemma3n": "its layers hand on four streams, mixed between layers, not one",
    "gemma3n_text": "its layers hand on four streams, mixed between layers, not one",
    "kosmos-2": "its forward can not run without a picture",
    "instructblip": "its forward can not run without a picture, and its Q-Former reads the prompt",
    "paligemma": "its processor marks prompt and answer as one block that attends in both "
    "directions: answers would leak into their own prediction",
    "chameleon": "it blocks some logits outright, behind its head",
    "bloom": "its ALiBi table joins rows and heads in one dimension",
}
"""Model types that can not be cut, with the reason."""


def family_of(model_type: str) -> Family:
    """The family of a model type; one without a line here is found by structure.

    Raises ModelUnsupported with the reason for a type that is known not to work.
    """
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"a model must be a decoder that can be cut between layers; {model_type!r} can not: "
            f"{REFUSED[model_type]}."
        )
    return FAMILIES.get(model_type) or generic(model_type)


_FAMILY_DESCRIPTIONS = {
    "blip-2": "BLIP-2 over a decoder (OPT, Llama)",
    "minigpt4": "MiniGPT-4: BLIP-2's vision over Llama/Vicuna",
    "llava": "LLaVA-1.5",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "gpt2": "GPT-2 (text)",
    "llama": "Llama, Vicuna (text)",
    "qwen2": "Qwen2 and Qwen2.5 (text)",
    "qwen3": "Qwen3 (text)",
    "opt": "OPT (text)",
}


def list_families() -> dict[str, str]:
    """`config.model_type` of each family with an adapter of its own, and what it is.

    Other image-text-to-text models and decoders of Hugging Face are found by structure.
    """
    return dict(_FAMILY_DESCRIPTIONS)


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


TINY: dict[str, TinyModel] = {
    "llava": TinyModel(
        "LlavaForConditionalGeneration", _tiny_llava_config, _tiny_llava_processor, add_bos=True
    ),
    "llava_onevision": TinyModel(
        "LlavaOnevisionForConditionalGeneration", _tiny_onevision_config, _tiny_onevision_processor
    ),
    "qwen2_vl": TinyModel(
        "Qwen2VLForConditionalGeneration", _tiny_qwen2_vl_config, _tiny_qwen2_vl_processor
    ),
    "qwen2_5_vl": TinyModel(
        "Qwen2_5_VLForConditionalGeneration", _tiny_qwen2_5_vl_config, _tiny_qwen2_vl_processor
    ),
    "qwen3_vl": TinyModel(
        "Qwen3VLForConditionalGeneration", _tiny_qwen3_vl_config, _tiny_qwen3_vl_processor
    ),
    "blip2": TinyModel(
        "Blip2ForConditionalGeneration", _tiny_blip2_config, _tiny_blip2_processor, add_bos=True
    ),
    "minigpt4": TinyModel(
        "MiniGPT4ForConditionalGeneration",
        _tiny_minigpt4_config,
        _tiny_minigpt4_processor,
        add_bos=True,
    ),
    "gpt2": TinyModel("GPT2LMHeadModel", _tiny_gpt2_config, _use_tokenizer),
    "llama": TinyModel("LlamaForCausalLM", _tiny_llama_config, _use_tokenizer, add_bos=True),
    "qwen2": TinyModel("Qwen2ForCausalLM", _tiny_qwen2_config, _use_tokenizer),
}
