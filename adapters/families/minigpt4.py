"""MiniGPT-4: BLIP-2's vision tower and Q-Former before a Llama decoder.

The image tokens stand in the middle of the prompt: `###Human: <Img>[32 tokens]</Img> question
###Assistant: answer`. The Hugging Face classes are in `minigpt4_model.py`.
"""

from __future__ import annotations

from typing import Any

from errata.adapters.families.base import Family
from errata.adapters.families.blip2 import encode_qformer_images, make_family, qformer_config
from errata.adapters.families.tiny_configs import (
    TinyModel,
    TinySize,
    decoder_config,
    tower_config,
)
from errata.adapters.inputs.prompt_format import PromptTemplate
from errata.adapters.inputs.vision_inputs import VisionFormat

__all__ = ["family"]


def _tiny_minigpt4_config(size: TinySize) -> Any:
    import transformers as hf

    from errata.adapters.families.minigpt4_model import MiniGPT4Config

    return MiniGPT4Config(
        vision_config=hf.Blip2VisionConfig(**tower_config(8, 32)).to_dict(),
        qformer_config=hf.Blip2QFormerConfig(**qformer_config(size)).to_dict(),
        text_config=hf.LlamaConfig(**decoder_config(size)).to_dict(),
        num_query_tokens=4,
    )


def _tiny_minigpt4_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from errata.adapters.families.minigpt4_model import MiniGPT4Processor

    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    return MiniGPT4Processor(image_processor=images, tokenizer=tokenizer)


def _processor_class() -> type:
    from errata.adapters.families.minigpt4_model import MiniGPT4Processor

    return MiniGPT4Processor


# prompt_wrap of EasyEdit tokenizes what surrounds the image apart from the question.
_WRAPPED = PromptTemplate(
    chat=False,
    raw_template=("{images}", "{prompt}"),
    image_wrapper="###Human: <Img>{}</Img> ",
    answer_separator=" ",
    add_bos=False,
)

family: Family = make_family(
    "minigpt4",
    title="MiniGPT-4: BLIP-2's vision over Llama/Vicuna",
    vision=VisionFormat(
        "inserted_ids",
        ("###Human: {images}{prompt}###Assistant:",),
        "<Img>{}</Img> ",
        encode_images=encode_qformer_images,
    ),
    processor=_processor_class,
    tiny=TinyModel(
        "MiniGPT4ForConditionalGeneration",
        _tiny_minigpt4_config,
        _tiny_minigpt4_processor,
        add_bos=True,
    ),
    templates={
        "easyedit": _WRAPPED,
        "easyedit-trainer": _WRAPPED,
        "vlkeb": _WRAPPED,
        "mmke": _WRAPPED,
    },
)
