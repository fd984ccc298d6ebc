"""A tiny random model of every family, with its processor: for tests, documentation, benchmarks.

Nothing is downloaded and nothing is shipped: sizes are a few dozen, weights are drawn from a seed,
and the tokenizer is a byte-level BPE trained on a few sentences as it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from errata.functional.errors import UnsupportedModelError

__all__ = ["TINY", "TinyModel", "tiny_model", "tiny_tokenizer"]

SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
CORPUS = (
    "Question: what is in the picture? Answer: a red cat and two dogs, on the left of the chair.",
    "USER: describe the photo in one sentence. ASSISTANT: this is the old town of the capital.",
    "the president of the country was born in the city of the river and the mountain lake",
    "who is the author of the book, when was it written and where does the story take place?",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'video' %}VIDEO"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}"
    "{% endfor %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: {{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MAX_POSITIONS, VISION_DIM, HEAD_DIM = (
    512,
    32,
    16,
)  # longest row, width of the towers, width of one head


class TinySize(NamedTuple):
    """What a tiny model is asked to be."""

    num_layers: int
    hidden_size: int
    tokenizer: Any

    def token_id(self, text: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(text)


class TinyModel(NamedTuple):
    """How to build one family: its model class by name, its config, its processor."""

    class_name: str
    config: Callable[[TinySize], Any]
    processor: Callable[[Any], Any]
    add_bos: bool = False


@functools.lru_cache(maxsize=2)
def _train_bpe(add_bos: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
        min_frequency=2,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    if add_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return bpe.to_str()


def tiny_tokenizer(add_bos: bool = False) -> Any:
    """A byte-level BPE tokenizer of some 350 tokens; with `bos` it puts `<s>` before a text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train_bpe(add_bos)),
        bos_token="<s>",
        eos_token="</s>" if add_bos else "<|im_end|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=MAX_POSITIONS,
    )


# ---- configs


def decoder_config(size: TinySize, **overrides: Any) -> dict[str, Any]:
    num_heads = size.hidden_size // HEAD_DIM
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **overrides.pop("rope", {})}
    return {
        "vocab_size": len(size.tokenizer),
        "hidden_size": size.hidden_size,
        "intermediate_size": 2 * size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(1, num_heads // 2),
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": rope,
        "initializer_range": 0.08,
        "bos_token_id": size.tokenizer.bos_token_id,
        "eos_token_id": size.tokenizer.eos_token_id,
        "pad_token_id": size.tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **overrides,
    }


def tower_config(patch_size: int, image_size: int) -> dict[str, Any]:
    return {
        "hidden_size": VISION_DIM,
        "intermediate_size": 2 * VISION_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        "initializer_range": 0.08,
    }


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


def vision_token_ids(size: TinySize) -> dict[str, Any]:
    return {
        "image_token_id": size.token_id("<|image_pad|>"),
        "video_token_id": size.token_id("<|video_pad|>"),
        "vision_start_token_id": size.token_id("<|vision_start|>"),
        "vision_end_token_id": size.token_id("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def _tiny_qwen2_vl_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.Qwen2VLConfig(
        text_config=decoder_config(size, rope={"mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2,
            "embed_dim": VISION_DIM,
            "hidden_size": size.hidden_size,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.08,
        },
        **vision_token_ids(size),
    )


def _tiny_qwen2_5_vl_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.Qwen2_5_VLConfig(
        text_config=decoder_config(size, rope={"mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2,
            "hidden_size": VISION_DIM,
            "intermediate_size": 2 * VISION_DIM,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": size.hidden_size,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.08,
        },
        **vision_token_ids(size),
    )


def _tiny_qwen3_vl_config(size: TinySize) -> Any:
    import transformers as hf

    text = decoder_config(size, rope={"mrope_section": [2, 3, 3], "mrope_interleaved": True})
    return hf.Qwen3VLConfig(
        text_config={**text, "head_dim": HEAD_DIM},
        vision_config={
            "depth": 3,
            "hidden_size": VISION_DIM,
            "intermediate_size": 2 * VISION_DIM,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": size.hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.08,
        },
        **vision_token_ids(size),
    )


def qformer_config(size: TinySize) -> dict[str, Any]:
    return {
        "vocab_size": len(size.tokenizer),
        "hidden_size": VISION_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * VISION_DIM,
        "encoder_hidden_size": VISION_DIM,
        "cross_attention_frequency": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.08,
    }


def _tiny_blip2_config(size: TinySize) -> Any:
    import transformers as hf

    text = hf.OPTConfig(
        vocab_size=len(size.tokenizer),
        hidden_size=size.hidden_size,
        word_embed_proj_dim=size.hidden_size,
        ffn_dim=2 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        init_std=0.08,
        bos_token_id=size.tokenizer.bos_token_id,
        eos_token_id=size.tokenizer.eos_token_id,
        pad_token_id=size.tokenizer.pad_token_id,
    )
    return hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**tower_config(8, 32)),
        qformer_config=hf.Blip2QFormerConfig(**qformer_config(size)),
        text_config=text,
        num_query_tokens=4,
        image_token_index=size.token_id("<image>"),
    )


def _tiny_minigpt4_config(size: TinySize) -> Any:
    import transformers as hf

    from .minigpt4 import MiniGPT4Config

    return MiniGPT4Config(
        vision_config=hf.Blip2VisionConfig(**tower_config(8, 32)).to_dict(),
        qformer_config=hf.Blip2QFormerConfig(**qformer_config(size)).to_dict(),
        text_config=hf.LlamaConfig(**decoder_config(size)).to_dict(),
        num_query_tokens=4,
    )


def _tiny_gpt2_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.GPT2Config(
        vocab_size=len(size.tokenizer),
        n_embd=size.hidden_size,
        n_layer=size.num_layers,
        n_head=size.hidden_size // HEAD_DIM,
        n_positions=MAX_POSITIONS,
        initializer_range=0.08,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=size.tokenizer.bos_token_id,
        eos_token_id=size.tokenizer.eos_token_id,
    )


def _tiny_llama_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.LlamaConfig(**decoder_config(size))


def _tiny_qwen2_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.Qwen2Config(**decoder_config(size))


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


def _tiny_onevision_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .processors import LlavaOnevisionImageTextProcessor

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


def _tiny_qwen2_vl_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .processors import Qwen2VLImageTextProcessor

    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=64 * 64
    )
    return Qwen2VLImageTextProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=QWEN
    )


def _tiny_qwen3_vl_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .processors import Qwen3VLImageTextProcessor

    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=32 * 32,
        max_pixels=64 * 64,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLImageTextProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=QWEN
    )


def _tiny_blip2_processor(tokenizer: Any) -> Any:
    import transformers as hf

    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    return hf.Blip2Processor(image_processor=images, tokenizer=tokenizer, num_query_tokens=4)


def _tiny_minigpt4_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .minigpt4 import MiniGPT4Processor

    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    return MiniGPT4Processor(image_processor=images, tokenizer=tokenizer)


def _use_tokenizer(tokenizer: Any) -> Any:
    return tokenizer


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


def _model_class(name: str) -> type:
    import transformers as hf

    if name == "MiniGPT4ForConditionalGeneration":  # the only class that is ours
        from .minigpt4 import MiniGPT4ForConditionalGeneration

        return MiniGPT4ForConditionalGeneration
    return getattr(hf, name)


def tiny_model(
    name: str, seed: int = 0, num_layers: int = 3, hidden_size: int = 32
) -> tuple[Any, Any]:
    """A random model of a family and its processor (a tokenizer, where it takes no images).

    The model is in fp32, in evaluation mode, asks for no gradients, and follows from the seed;
    `layers` and `width` (a multiple of 32) are those of the decoder. Raises ModelUnsupported for
    a name that is not in `TINY`.

    >>> module, processor = tiny_model("llava", num_layers=2)
    >>> module.config.model_type, module.config.text_config.num_hidden_layers
    ('llava', 2)
    """
    if name not in TINY:
        raise UnsupportedModelError(
            f"a tiny model must be one of {', '.join(sorted(TINY))}; got {name!r}."
        )
    if hidden_size % (2 * HEAD_DIM) or hidden_size <= 0 or num_layers < 1:
        raise UnsupportedModelError(
            f"a tiny model needs num_layers >= 1 and a hidden_size that is a multiple of {2 * HEAD_DIM}, "
            f"got num_layers={num_layers}, hidden_size={hidden_size}."
        )
    entry = TINY[name]
    processor = entry.processor(tiny_tokenizer(entry.add_bos))
    tokenizer = getattr(processor, "tokenizer", processor)
    config = entry.config(TinySize(num_layers, hidden_size, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _model_class(entry.class_name)(config)
        if hasattr(module, "query_tokens"):  # Hugging Face leaves zeros, all queries alike
            torch.nn.init.normal_(module.query_tokens, std=0.5)
    module.requires_grad_(False)
    return module.eval(), processor
