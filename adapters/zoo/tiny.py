"""`tiny_model`: a random model of any family, for tests and docs."""

from __future__ import annotations

from typing import Any

import torch

from errata.adapters.families.table import tiny_families
from errata.adapters.families.tiny_configs import HEAD_DIM, TinySize, tiny_tokenizer
from errata.functional.errors import UnsupportedModelError

__all__ = ["tiny_model"]


def _model_class(name: str) -> type:
    import transformers as hf

    if name == "MiniGPT4ForConditionalGeneration":  # the only class that is ours
        from errata.adapters.families.minigpt4_model import MiniGPT4ForConditionalGeneration

        return MiniGPT4ForConditionalGeneration
    return getattr(hf, name)


def tiny_model(
    name: str, seed: int = 0, num_layers: int = 3, hidden_size: int = 32
) -> tuple[Any, Any]:
    """Make a random model of a family and its processor (a tokenizer for a text-only family).

    The model is in fp32, in evaluation mode, without gradients.

    Args:
        name: A model type without hyphens, e.g. "blip2".
        seed: Seed of the weights.
        num_layers: Layers of the decoder.
        hidden_size: Width of the decoder, a multiple of 32.

    Returns:
        The module and its processor.

    Raises:
        UnsupportedModelError: If there is no tiny model of this name, or a size does not fit.

    Example:
        >>> module, processor = tiny_model("llava", num_layers=2)
        >>> module.config.model_type, module.config.text_config.num_hidden_layers
        ('llava', 2)
    """
    tiny = tiny_families()
    if name not in tiny:
        raise UnsupportedModelError(
            f"a tiny model must be one of {', '.join(sorted(tiny))}; got {name!r}."
        )
    if hidden_size % (2 * HEAD_DIM) or hidden_size <= 0 or num_layers < 1:
        raise UnsupportedModelError(
            "a tiny model needs num_layers >= 1 and a hidden_size that is a multiple of "
            f"{2 * HEAD_DIM}, "
            f"got num_layers={num_layers}, hidden_size={hidden_size}."
        )
    entry = tiny[name]
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
