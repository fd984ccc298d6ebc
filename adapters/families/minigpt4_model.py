"""MiniGPT-4 as Hugging Face classes: BLIP-2's vision tower and Q-Former before a Llama decoder.

The original (Zhu et al. 2023, arXiv 2304.10592; Vision-CAIR/MiniGPT-4, `mini_gpt4.py`) feeds the 32
Q-Former outputs through one linear map, `llama_proj`, into the middle of a wrapped prompt,
`###Human: <Img>[32 image tokens]</Img> question###Assistant: answer`. Hugging Face has no class
for it. Its modules are those of BLIP-2, so it is one here: `Blip2ForConditionalGeneration` whose
text model is Llama and whose `language_projection` is `llama_proj`. Only the place of the image
tokens differs (`minigpt4.py`). Saving and loading are Hugging Face's; `minigpt4_convert.py` makes
such a folder from the original checkpoint files.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
)
from transformers.processing_utils import ProcessorMixin

__all__ = ["MiniGPT4Config", "MiniGPT4ForConditionalGeneration", "MiniGPT4Processor"]


class MiniGPT4Config(Blip2Config):
    """Sizes of a MiniGPT-4: a vision tower, a Q-Former, a Llama.

    `image_token_index` is the id written at image positions; nothing is looked up there, so any id
    that text never yields will do (0, Llama's unknown token).
    """

    model_type = "minigpt4"

    def __init__(self, text_config: Any = None, image_token_index: int = 0, **kwargs: Any):
        if text_config is None:
            text_config = LlamaConfig()
        elif isinstance(text_config, dict):
            text_config = LlamaConfig(**text_config)
        super().__init__(text_config=text_config, image_token_index=image_token_index, **kwargs)


class MiniGPT4ForConditionalGeneration(Blip2ForConditionalGeneration):
    """`Blip2ForConditionalGeneration` over Llama; image tokens may stand anywhere in a row."""

    config: MiniGPT4Config


class MiniGPT4Processor(ProcessorMixin):
    """An image processor and a tokenizer, saved together."""

    def __init__(self, image_processor: Any, tokenizer: Any, **_: Any):
        super().__init__(image_processor, tokenizer)


def register() -> None:
    """Let Hugging Face's auto classes know MiniGPT-4; asking again changes nothing."""
    AutoConfig.register("minigpt4", MiniGPT4Config, exist_ok=True)
    AutoModelForImageTextToText.register(
        MiniGPT4Config, MiniGPT4ForConditionalGeneration, exist_ok=True
    )
