"""Micro configurations of real Hugging Face classes, and the processors that go with them.

Every family shares one text size and one vision size; what differs is what makes it that family.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import transformers as hf
from tokenizers import Tokenizer

from errata.adapters.families.llava_onevision import LlavaOnevisionImageTextProcessor
from errata.adapters.families.minigpt4_model import (
    MiniGPT4Config,
    MiniGPT4ForConditionalGeneration,
    MiniGPT4Processor,
)
from errata.adapters.families.qwen2_vl import Qwen2VLImageTextProcessor
from errata.adapters.zoo.assets import IMAGE_SIZE

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, FFN_DIM = 192, 4, 6, 2, 512
OPT_FFN_DIM = 672  # so that 4 M parameters stay below 8 MB in fp16
VISION_HIDDEN_SIZE, NUM_VISION_LAYERS, NUM_VISION_HEADS = 128, 4, 4
NUM_QUERIES = 8
MAX_POSITIONS = 512

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<video>",
    "</s>",
    "<Img>",
    "</Img>",
    "<ImageHere>",
)
PAD, END = "<|endoftext|>", "<|end|>"
NORMALIZATION: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}

# One turn: <|user|> image question <|assistant|> answer <|end|>
CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% else %}<|assistant|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Micro(NamedTuple):
    """A family of the zoo: its model class, how to configure it, how to build its processor.

    A question about an image is `opening`, `num_image_tokens` times `image`, `closing`, the
    question, `after`, the answer, `END`; one without is `before`, the question, `after`, the
    answer, `END`. `tokens` names special tokens that the family's processor asks for.
    """

    module: type
    config: Callable[[Tokenizer], Any]
    processor: Callable[[Any], Any]
    image: str
    num_image_tokens: int
    opening: str = "<|user|>"
    closing: str = ""
    before: str = "<|user|>"
    after: str = "<|assistant|>"
    special_tokens: Mapping[str, Any] = {}


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary is known to hold.

    Args:
        tokenizer: The tokenizer.
        token: The token.

    Returns:
        Its id.
    """
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def fast_tokenizer(tokenizer: Tokenizer, **extra: Any) -> hf.PreTrainedTokenizerFast:
    """Wrap a trained `tokenizers` tokenizer for Hugging Face.

    Args:
        tokenizer: The tokenizer.
        **extra: Further options of `PreTrainedTokenizerFast`.

    Returns:
        A fast tokenizer.
    """
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        **extra,
    )


def _text_config(tokenizer: Tokenizer, **extra: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": FFN_DIM,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": rope | extra,
        "bos_token_id": None,
        "eos_token_id": token_id(tokenizer, END),
        "pad_token_id": token_id(tokenizer, PAD),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


def _tower_config(patch_size: int) -> dict[str, Any]:
    return {
        "hidden_size": VISION_HIDDEN_SIZE,
        "intermediate_size": 4 * VISION_HIDDEN_SIZE,
        "num_hidden_layers": NUM_VISION_LAYERS,
        "num_attention_heads": NUM_VISION_HEADS,
        "image_size": IMAGE_SIZE,
        "patch_size": patch_size,
    }


def _square_size() -> dict[str, int]:
    return {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


# ---- LLaVA: CLIP tower, two-layer projector, Llama


def _llava_config(tokenizer: Tokenizer) -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            **_tower_config(16), projection_dim=VISION_HIDDEN_SIZE, hidden_act="gelu"
        ),
        text_config=hf.LlamaConfig(**_text_config(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def _llava_processor(tokenizer: Any) -> Any:
    images = hf.CLIPImageProcessorPil(
        size=_square_size(), crop_size=_square_size(), **NORMALIZATION
    )
    return hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


# ---- LLaVA-OneVision: SigLIP tower, one anyres tile, Qwen2


def _onevision_config(tokenizer: Tokenizer) -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_tower_config(16), vision_use_head=False),
        text_config=hf.Qwen2Config(**_text_config(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        tie_word_embeddings=True,
    )


def _onevision_processor(tokenizer: Any) -> Any:
    images = hf.LlavaOnevisionImageProcessorPil(
        size=_square_size(), image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]], **NORMALIZATION
    )
    return LlavaOnevisionImageTextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


# ---- Qwen2-VL: its own tower (patch 8, merged 2 x 2), M-RoPE


def _qwen2_vl_config(tokenizer: Tokenizer) -> Any:
    return hf.Qwen2VLConfig(
        text_config=_text_config(tokenizer, mrope_section=[4, 6, 6]),
        vision_config={
            "depth": NUM_VISION_LAYERS,
            "embed_dim": VISION_HIDDEN_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "num_heads": NUM_VISION_HEADS,
            "mlp_ratio": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _qwen2_vl_processor(tokenizer: Any) -> Any:
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=IMAGE_SIZE**2,
        max_pixels=IMAGE_SIZE**2,
        **NORMALIZATION,
    )
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen2VLImageTextProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=chat
    )


# ---- BLIP-2: ViT, Q-Former, OPT; no chat template, image tokens lead


def _qformer_configs(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vision_config": hf.Blip2VisionConfig(**_tower_config(8), initializer_range=0.02),
        "qformer_config": hf.Blip2QFormerConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=VISION_HIDDEN_SIZE,
            num_hidden_layers=NUM_VISION_LAYERS,
            num_attention_heads=NUM_VISION_HEADS,
            intermediate_size=4 * VISION_HIDDEN_SIZE,
            cross_attention_frequency=1,
            encoder_hidden_size=VISION_HIDDEN_SIZE,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "num_query_tokens": NUM_QUERIES,
    }


def _blip2_config(tokenizer: Tokenizer) -> Any:
    return hf.Blip2Config(
        **_qformer_configs(tokenizer),
        image_token_index=token_id(tokenizer, "<image>"),
        text_config=hf.OPTConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=HIDDEN_SIZE,
            word_embed_proj_dim=HIDDEN_SIZE,
            ffn_dim=OPT_FFN_DIM,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            bos_token_id=token_id(tokenizer, "</s>"),
            eos_token_id=token_id(tokenizer, END),
            pad_token_id=token_id(tokenizer, PAD),
        ),
    )


def _blip2_processor(tokenizer: Any) -> Any:
    images = hf.BlipImageProcessorPil(size=_square_size(), **NORMALIZATION)
    return hf.Blip2Processor(
        image_processor=images, tokenizer=tokenizer, num_query_tokens=NUM_QUERIES
    )


# ---- MiniGPT-4: BLIP-2's eyes before a Llama


def _minigpt4_config(tokenizer: Tokenizer) -> Any:
    return MiniGPT4Config(
        **_qformer_configs(tokenizer),
        text_config=hf.LlamaConfig(**_text_config(tokenizer)),
        image_token_index=token_id(tokenizer, "<ImageHere>"),
    )


def _minigpt4_processor(tokenizer: Any) -> Any:
    images = hf.BlipImageProcessorPil(size=_square_size(), **NORMALIZATION)
    return MiniGPT4Processor(image_processor=images, tokenizer=tokenizer)


MICRO: dict[str, Micro] = {
    "llava": Micro(
        hf.LlavaForConditionalGeneration, _llava_config, _llava_processor, "<image>", 16
    ),
    "llava_onevision": Micro(
        hf.LlavaOnevisionForConditionalGeneration,
        _onevision_config,
        _onevision_processor,
        "<image>",
        36,  # 16 of the whole image, 16 of its one tile, a newline per tile row
    ),
    "qwen2_vl": Micro(
        hf.Qwen2VLForConditionalGeneration,
        _qwen2_vl_config,
        _qwen2_vl_processor,
        "<|image_pad|>",
        16,
        opening="<|user|><|vision_start|>",
        closing="<|vision_end|>",
    ),
    "blip2": Micro(
        hf.Blip2ForConditionalGeneration,
        _blip2_config,
        _blip2_processor,
        "<image>",
        NUM_QUERIES,
        opening="",
        closing="Question:",
        before="Question:",
        after=" Answer:",
        special_tokens={"bos_token": "</s>"},
    ),
    "minigpt4": Micro(
        MiniGPT4ForConditionalGeneration,
        _minigpt4_config,
        _minigpt4_processor,
        "<ImageHere>",
        NUM_QUERIES,
        opening="###Human: <Img>",
        closing="</Img>",
        before="###Human:",
        after="###Assistant:",
    ),
}
