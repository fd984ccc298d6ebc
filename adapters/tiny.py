"""A tiny random model of every family, with its processor: for tests, documentation, benchmarks.

Nothing is downloaded and nothing is shipped: sizes are a few dozen, weights are drawn from a seed,
and the tokenizer is a byte-level BPE trained on a few sentences as it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from errata.functional.errors import ModelUnsupported

__all__ = ["TINY", "Tiny", "tiny", "tiny_tokenizer"]

SPECIALS = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|image_pad|>",
    "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
)  # fmt: skip
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
CONTEXT, VISION, HEAD = 512, 32, 16  # longest row, width of the towers, width of one head


class Size(NamedTuple):
    """What a tiny model is asked to be."""

    layers: int
    width: int
    tokenizer: Any

    def token(self, text: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(text)


class Tiny(NamedTuple):
    """How to build one family: its model class by name, its config, its processor."""

    module: str
    config: Callable[[Size], Any]
    processor: Callable[[Any], Any]
    bos: bool = False


@functools.lru_cache(maxsize=2)
def _bpe(bos: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=list(SPECIALS), initial_alphabet=alphabet,
        show_progress=False, min_frequency=2,
    )  # fmt: skip
    bpe.train_from_iterator(CORPUS, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return bpe.to_str()


def tiny_tokenizer(bos: bool = False) -> Any:
    """A byte-level BPE tokenizer of some 350 tokens; with `bos` it puts `<s>` before a text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(bos)), bos_token="<s>",
        eos_token="</s>" if bos else "<|im_end|>", pad_token="<pad>", padding_side="right",
        model_max_length=CONTEXT,
    )  # fmt: skip


# ---- configs


def _decoder(size: Size, **more: Any) -> dict[str, Any]:
    heads = size.width // HEAD
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **more.pop("rope", {})}
    return {
        "vocab_size": len(size.tokenizer), "hidden_size": size.width,
        "intermediate_size": 2 * size.width, "num_hidden_layers": size.layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": CONTEXT, "rope_parameters": rope, "initializer_range": 0.08,
        "bos_token_id": size.tokenizer.bos_token_id, "eos_token_id": size.tokenizer.eos_token_id,
        "pad_token_id": size.tokenizer.pad_token_id, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _tower(patch: int, image: int) -> dict[str, Any]:
    return {
        "hidden_size": VISION, "intermediate_size": 2 * VISION, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": image, "patch_size": patch,
        "initializer_range": 0.08,
    }  # fmt: skip


def _llava(size: Size) -> Any:
    import transformers as hf

    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_tower(16, 48), projection_dim=VISION),
        text_config=hf.LlamaConfig(**_decoder(size)), image_token_index=size.token("<image>"),
        image_seq_length=9, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip


def _onevision(size: Size) -> Any:
    import transformers as hf

    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_tower(16, 32), vision_use_head=False),
        text_config=hf.Qwen2Config(**_decoder(size)),
        image_token_index=size.token("<image>"), video_token_index=size.token("<video>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]], tie_word_embeddings=False,
    )  # fmt: skip


def _vision_tokens(size: Size) -> dict[str, Any]:
    return {
        "image_token_id": size.token("<|image_pad|>"),
        "video_token_id": size.token("<|video_pad|>"),
        "vision_start_token_id": size.token("<|vision_start|>"),
        "vision_end_token_id": size.token("<|vision_end|>"), "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen2_vl(size: Size) -> Any:
    import transformers as hf

    return hf.Qwen2VLConfig(
        text_config=_decoder(size, rope={"mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2, "embed_dim": VISION, "hidden_size": size.width, "num_heads": 2,
            "mlp_ratio": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "initializer_range": 0.08,
        },
        **_vision_tokens(size),
    )  # fmt: skip


def _qwen2_5_vl(size: Size) -> Any:
    import transformers as hf

    return hf.Qwen2_5_VLConfig(
        text_config=_decoder(size, rope={"mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2, "hidden_size": VISION, "intermediate_size": 2 * VISION, "num_heads": 2,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": size.width, "window_size": 32, "fullatt_block_indexes": [1],
            "initializer_range": 0.08,
        },
        **_vision_tokens(size),
    )  # fmt: skip


def _qwen3_vl(size: Size) -> Any:
    import transformers as hf

    text = _decoder(size, rope={"mrope_section": [2, 3, 3], "mrope_interleaved": True})
    return hf.Qwen3VLConfig(
        text_config={**text, "head_dim": HEAD},
        vision_config={
            "depth": 3, "hidden_size": VISION, "intermediate_size": 2 * VISION, "num_heads": 2,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": size.width, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1], "initializer_range": 0.08,
        },
        **_vision_tokens(size),
    )  # fmt: skip


def _qformer(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": len(size.tokenizer), "hidden_size": VISION, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 2 * VISION, "encoder_hidden_size": VISION,
        "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.08,
    }  # fmt: skip


def _blip2(size: Size) -> Any:
    import transformers as hf

    text = hf.OPTConfig(
        vocab_size=len(size.tokenizer), hidden_size=size.width, word_embed_proj_dim=size.width,
        ffn_dim=2 * size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.width // HEAD, max_position_embeddings=CONTEXT, dropout=0.0,
        init_std=0.08, bos_token_id=size.tokenizer.bos_token_id,
        eos_token_id=size.tokenizer.eos_token_id, pad_token_id=size.tokenizer.pad_token_id,
    )  # fmt: skip
    return hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**_tower(8, 32)),
        qformer_config=hf.Blip2QFormerConfig(**_qformer(size)), text_config=text,
        num_query_tokens=4, image_token_index=size.token("<image>"),
    )  # fmt: skip


def _minigpt4(size: Size) -> Any:
    import transformers as hf

    from .minigpt4 import MiniGPT4Config

    return MiniGPT4Config(
        vision_config=hf.Blip2VisionConfig(**_tower(8, 32)).to_dict(),
        qformer_config=hf.Blip2QFormerConfig(**_qformer(size)).to_dict(),
        text_config=hf.LlamaConfig(**_decoder(size)).to_dict(), num_query_tokens=4,
    )  # fmt: skip


def _gpt2(size: Size) -> Any:
    import transformers as hf

    return hf.GPT2Config(
        vocab_size=len(size.tokenizer), n_embd=size.width, n_layer=size.layers,
        n_head=size.width // HEAD, n_positions=CONTEXT, initializer_range=0.08,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=size.tokenizer.bos_token_id, eos_token_id=size.tokenizer.eos_token_id,
    )  # fmt: skip


def _llama(size: Size) -> Any:
    import transformers as hf

    return hf.LlamaConfig(**_decoder(size))


def _qwen2(size: Size) -> Any:
    import transformers as hf

    return hf.Qwen2Config(**_decoder(size))


# ---- processors


def _llava_processor(tokenizer: Any) -> Any:
    import transformers as hf

    square = {"height": 48, "width": 48}
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=square),
        tokenizer=tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=VICUNA,
    )  # fmt: skip


def _onevision_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .processors import LlavaOnevisionPictures

    images = hf.LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
    )
    return LlavaOnevisionPictures(
        image_processor=images, tokenizer=tokenizer, num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>").replace("VIDEO", "<video>"),
    )  # fmt: skip


def _qwen_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .processors import Qwen2VLPictures

    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=64 * 64
    )
    return Qwen2VLPictures(image_processor=images, tokenizer=tokenizer, chat_template=QWEN)


def _qwen3_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .processors import Qwen3VLPictures

    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=64 * 64,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return Qwen3VLPictures(image_processor=images, tokenizer=tokenizer, chat_template=QWEN)


def _blip2_processor(tokenizer: Any) -> Any:
    import transformers as hf

    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    return hf.Blip2Processor(image_processor=images, tokenizer=tokenizer, num_query_tokens=4)


def _minigpt4_processor(tokenizer: Any) -> Any:
    import transformers as hf

    from .minigpt4 import MiniGPT4Processor

    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    return MiniGPT4Processor(image_processor=images, tokenizer=tokenizer)


def _same(tokenizer: Any) -> Any:
    return tokenizer


TINY: dict[str, Tiny] = {
    "llava": Tiny("LlavaForConditionalGeneration", _llava, _llava_processor, bos=True),
    "llava_onevision": Tiny(
        "LlavaOnevisionForConditionalGeneration", _onevision, _onevision_processor
    ),
    "qwen2_vl": Tiny("Qwen2VLForConditionalGeneration", _qwen2_vl, _qwen_processor),
    "qwen2_5_vl": Tiny("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, _qwen_processor),
    "qwen3_vl": Tiny("Qwen3VLForConditionalGeneration", _qwen3_vl, _qwen3_processor),
    "blip2": Tiny("Blip2ForConditionalGeneration", _blip2, _blip2_processor, bos=True),
    "minigpt4": Tiny("MiniGPT4ForConditionalGeneration", _minigpt4, _minigpt4_processor, bos=True),
    "gpt2": Tiny("GPT2LMHeadModel", _gpt2, _same),
    "llama": Tiny("LlamaForCausalLM", _llama, _same, bos=True),
    "qwen2": Tiny("Qwen2ForCausalLM", _qwen2, _same),
}


def _class(name: str) -> type:
    import transformers as hf

    if name == "MiniGPT4ForConditionalGeneration":  # the only class that is ours
        from .minigpt4 import MiniGPT4ForConditionalGeneration

        return MiniGPT4ForConditionalGeneration
    return getattr(hf, name)


def tiny(name: str, seed: int = 0, layers: int = 3, width: int = 32) -> tuple[Any, Any]:
    """A random model of a family and its processor (a tokenizer, where it takes no images).

    The model is in fp32, in evaluation mode, asks for no gradients, and follows from the seed;
    `layers` and `width` (a multiple of 32) are those of the decoder. Raises ModelUnsupported for
    a name that is not in `TINY`.

    >>> module, processor = tiny("llava", layers=2)
    >>> module.config.model_type, module.config.text_config.num_hidden_layers
    ('llava', 2)
    """
    if name not in TINY:
        raise ModelUnsupported(
            f"a tiny model must be one of {', '.join(sorted(TINY))}; got {name!r}."
        )
    if width % (2 * HEAD) or width <= 0 or layers < 1:
        raise ModelUnsupported(
            f"a tiny model needs layers >= 1 and a width that is a multiple of {2 * HEAD}, "
            f"got layers={layers}, width={width}."
        )
    entry = TINY[name]
    processor = entry.processor(tiny_tokenizer(entry.bos))
    tokenizer = getattr(processor, "tokenizer", processor)
    config = entry.config(Size(layers, width, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _class(entry.module)(config)
        if hasattr(module, "query_tokens"):  # Hugging Face leaves zeros, all queries alike
            torch.nn.init.normal_(module.query_tokens, std=0.5)
    module.requires_grad_(False)
    return module.eval(), processor
