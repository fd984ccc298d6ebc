"""Random models of middling size with E-VQA-like cases: what the cost benchmarks run on.

The sizes are those of the reference measurements: a decoder of 12 layers of width 768, a vision
tower of 6 layers of width 384 over 224 px pictures. Weights are random, so only costs mean
anything.
"""

from __future__ import annotations

import random

import torch
import transformers
from PIL import Image

from errata.functional import Case, Query

__all__ = ["blip2", "cases"]

_SENTENCE = (
    "what is the color of this animal how many people are in picture where does man stand which "
    "kind food on table sport do they play time clock show left right big small red blue green"
)
_WORDS = _SENTENCE.split()
_WIDTH, _LAYERS, _VISION, _SIDE, _VOCAB = 768, 12, 384, 224, 4096


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = ["<pad>", "</s>", "<image>", *alphabet, *("Ġ" + word for word in _WORDS)]
    ranks = {token: number for number, token in enumerate(dict.fromkeys(vocab))}
    merges = []
    for word in _WORDS:
        left = "Ġ"
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            ranks.setdefault(left, len(ranks))
    core = Tokenizer(models.BPE(vocab=ranks, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="</s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=512,
    )  # fmt: skip


def blip2(seed: int = 0):
    """A random BLIP-2 with OPT (about 110 M parameters, fp32) and its processor."""
    tokenizer = _tokenizer()
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(
            hidden_size=_VISION, intermediate_size=4 * _VISION, num_hidden_layers=6,
            num_attention_heads=6, image_size=_SIDE, patch_size=14, initializer_range=0.02,
        ),
        qformer_config=transformers.Blip2QFormerConfig(
            vocab_size=_VOCAB, hidden_size=_VISION, num_hidden_layers=4, num_attention_heads=6,
            intermediate_size=4 * _VISION, encoder_hidden_size=_VISION,
        ),
        text_config=transformers.OPTConfig(
            vocab_size=_VOCAB, hidden_size=_WIDTH, ffn_dim=4 * _WIDTH, num_hidden_layers=_LAYERS,
            num_attention_heads=12, word_embed_proj_dim=_WIDTH, max_position_embeddings=512,
            bos_token_id=1, eos_token_id=1, pad_token_id=0,
        ),
        num_query_tokens=32,
        image_token_index=tokenizer.get_vocab()["<image>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    module = transformers.Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(module.query_tokens, std=0.5)  # zeros as published
    pixels = transformers.BlipImageProcessor(size={"height": _SIDE, "width": _SIDE})
    return module, transformers.Blip2Processor(pixels, tokenizer, num_query_tokens=32)


def cases(count: int, seed: int = 0) -> list[Case]:
    """Cases with the lengths of E-VQA: prompts of 4 to 9 words, targets of one or two."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(low, high)))

    def picture() -> Image.Image:
        noise = Image.frombytes("RGB", (16, 12), rng.randbytes(16 * 12 * 3))
        return noise.resize((320, 240), Image.Resampling.BICUBIC)

    made = []
    for number in range(count):
        image, other, far = (picture(),), (picture(),), (picture(),)
        prompt, target = words(4, 9), words(1, 2)
        probes = {
            "reliability": (Query(prompt, target, image),),
            "rephrase": (Query(words(4, 12), target, image),),
            "image_rephrase": (Query(prompt, target, other),),
            "text_locality": (Query(words(8, 15), words(1, 5)),),
            "image_locality": (Query(words(5, 10), words(1, 2), far),),
        }
        made.append(Case(f"case-{number}", Query(prompt, target, image), probes))
    return made
