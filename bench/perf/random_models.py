"""Random models of middling size with E-VQA-like cases: what the cost benchmarks run on.

The sizes are those of the reference measurements: a decoder of 12 layers of width 768, a vision
tower of 6 layers of width 384 over 224 px images. Weights are random, so only costs mean
anything.
"""

from __future__ import annotations

import random

import torch
import transformers
from PIL import Image

from errata.functional import Case, Query

__all__ = ["MODELS", "blip2", "cases", "llava", "qwen2_vl"]

_SENTENCE = (
    "what is the color of this animal how many people are in picture where does man stand which "
    "kind food on table sport do they play time clock show left right big small red blue green"
)
_WORDS = _SENTENCE.split()
_TEMPLATE_WORDS = ("Question", "Answer", "USER", "ASSISTANT", "user", "assistant")  # by templates
_SPECIAL_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
)
_WIDTH, _LAYERS, _VISION, _SIDE, _VOCAB = 768, 12, 384, 224, 4096
_GATED = 2048  # three maps of this height weigh what two of 4 x 768 do


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [
        "<pad>",
        "</s>",
        "<image>",
        *_SPECIAL_TOKENS,
        *alphabet,
        *("Ġ" + word for word in _WORDS),
    ]
    ranks = {token: number for number, token in enumerate(dict.fromkeys(vocab))}
    merges: list[tuple[str, str]] = []
    for word in [*("Ġ" + word for word in (*_WORDS, *_TEMPLATE_WORDS)), *_WORDS, *_TEMPLATE_WORDS]:
        left = word[0]
        for letter in word[1:]:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            ranks.setdefault(left, len(ranks))
    core = Tokenizer(models.BPE(vocab=ranks, merges=merges))
    core.add_special_tokens(["<image>", *_SPECIAL_TOKENS])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
    )


def _decoder(**more) -> dict:
    return {
        "vocab_size": _VOCAB,
        "hidden_size": _WIDTH,
        "intermediate_size": _GATED,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **more,
    }


def blip2(seed: int = 0):
    """A random BLIP-2 with OPT (about 110 M parameters, fp32) and its processor."""
    tokenizer = _tokenizer()
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(
            hidden_size=_VISION,
            intermediate_size=4 * _VISION,
            num_hidden_layers=6,
            num_attention_heads=6,
            image_size=_SIDE,
            patch_size=14,
            initializer_range=0.02,
        ),
        qformer_config=transformers.Blip2QFormerConfig(
            vocab_size=_VOCAB,
            hidden_size=_VISION,
            num_hidden_layers=4,
            num_attention_heads=6,
            intermediate_size=4 * _VISION,
            encoder_hidden_size=_VISION,
        ),
        text_config=transformers.OPTConfig(
            vocab_size=_VOCAB,
            hidden_size=_WIDTH,
            ffn_dim=4 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=12,
            word_embed_proj_dim=_WIDTH,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        ),
        num_query_tokens=32,
        image_token_index=tokenizer.get_vocab()["<image>"],
    )
    torch.manual_seed(seed)
    module = transformers.Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(module.query_tokens, std=0.5)  # zeros as published
    pixels = transformers.BlipImageProcessor(size={"height": _SIDE, "width": _SIDE})
    return module, transformers.Blip2Processor(pixels, tokenizer, num_query_tokens=32)


def llava(seed: int = 0):
    """A random LLaVA with a Llama decoder (fp32) and its processor: 256 tokens an image."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=_VISION,
            intermediate_size=4 * _VISION,
            num_hidden_layers=6,
            num_attention_heads=6,
            image_size=_SIDE,
            patch_size=14,
            projection_dim=_VISION,
        ),
        text_config=transformers.LlamaConfig(**_decoder()),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=256,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    module = transformers.LlavaForConditionalGeneration(config).eval()
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE}
    )
    return module, transformers.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def qwen2_vl(seed: int = 0):
    """A random Qwen2-VL (fp32) and its processor: 64 tokens an image of 224 x 224."""
    from errata.adapters.families.qwen2_vl import Qwen2VLImageTextProcessor

    tokenizer = _tokenizer()
    ids = tokenizer.get_vocab()
    text = _decoder(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [8, 12, 12],
        }
    )
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": 6,
            "embed_dim": _VISION,
            "hidden_size": _WIDTH,
            "num_heads": 6,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<image>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    module = transformers.Qwen2VLForConditionalGeneration(config).eval()
    pixels = transformers.Qwen2VLImageProcessorPil(
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=_SIDE**2,
        max_pixels=_SIDE**2,
    )
    return module, Qwen2VLImageTextProcessor(image_processor=pixels, tokenizer=tokenizer)


MODELS = {"blip2": blip2, "llava": llava, "qwen2_vl": qwen2_vl}


def cases(num_cases: int, seed: int = 0) -> list[Case]:
    """Cases with the lengths of E-VQA: prompts of 4 to 9 words, targets of one or two.

    Args:
        num_cases: Cases.
        seed: Seed.

    Returns:
        Cases with random words and images.
    """
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(low, high)))

    def random_image() -> Image.Image:
        noise = Image.frombytes("RGB", (16, 12), rng.randbytes(16 * 12 * 3))
        return noise.resize((256, 256), Image.Resampling.BICUBIC)

    made_cases = []
    for number in range(num_cases):
        image, other, far = (random_image(),), (random_image(),), (random_image(),)
        prompt, target = words(4, 9), words(1, 2)
        probes = {
            "reliability": (Query(prompt, target, image),),
            "rephrase": (Query(words(4, 12), target, image),),
            "image_rephrase": (Query(prompt, target, other),),
            "text_locality": (Query(words(8, 15), words(1, 5)),),
            "image_locality": (Query(words(5, 10), words(1, 2), far),),
        }
        made_cases.append(Case(f"case-{number}", Query(prompt, target, image), probes))
    return made_cases
