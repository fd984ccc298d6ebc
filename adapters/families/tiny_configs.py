"""A tiny random model of every family, with its processor: for tests, documentation, benchmarks.

Nothing is downloaded and nothing is shipped: sizes are a few dozen, weights are drawn from a seed,
and the tokenizer is a byte-level BPE trained on a few sentences as it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["TinyModel", "tiny_tokenizer"]

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
        """The id of a token.

        Args:
            text: The token.

        Returns:
            Its id.
        """
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
    """A byte-level BPE tokenizer of about 350 tokens.

    Args:
        add_bos: Whether `<s>` is put before a text.

    Returns:
        A fast tokenizer.
    """
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
    """Config of a tiny decoder.

    Args:
        size: Sizes.
        **overrides: Values that replace the defaults.

    Returns:
        Config values.
    """
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
    """Config of a tiny vision tower.

    Args:
        patch_size: In pixels.
        image_size: In pixels.

    Returns:
        Config values.
    """
    return {
        "hidden_size": VISION_DIM,
        "intermediate_size": 2 * VISION_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        "initializer_range": 0.08,
    }


def vision_token_ids(size: TinySize) -> dict[str, Any]:
    """Ids of the vision tokens, as Qwen configs name them.

    Args:
        size: Sizes, with the tokenizer.

    Returns:
        Config values.
    """
    return {
        "image_token_id": size.token_id("<|image_pad|>"),
        "video_token_id": size.token_id("<|video_pad|>"),
        "vision_start_token_id": size.token_id("<|vision_start|>"),
        "vision_end_token_id": size.token_id("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
