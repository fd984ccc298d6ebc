"""`FAMILIES`: `config.model_type` -> everything about the family, or why it is refused."""

from __future__ import annotations

from collections.abc import Mapping

from errata.adapters.families import (
    blip2,
    llava,
    llava_onevision,
    minigpt4,
    qwen2_vl,
    qwen3_vl,
    text_only,
)
from errata.adapters.families.base import Family
from errata.adapters.families.tiny_configs import TinyModel
from errata.adapters.families.unlisted import generic
from errata.functional.errors import UnsupportedModelError

__all__ = ["FAMILIES", "REFUSED", "family_of", "list_families", "tiny_families"]

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        blip2.family,
        minigpt4.family,
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

_ENCODER_DECODER = "it is an encoder-decoder: its layers attend to an encoder's states"

REFUSED: Mapping[str, str] = {
    "t5": _ENCODER_DECODER,
    "bart": _ENCODER_DECODER,
    "florence2": _ENCODER_DECODER,
    "mllama": "its cross-attention layers read vision states, and are skipped "
    "where there is no image",
    "gemma3n": "its layers hand on four streams, mixed between layers, not one",
    "gemma3n_text": "its layers hand on four streams, mixed between layers, not one",
    "kosmos-2": "its forward cannot run without an image",
    "instructblip": "its forward cannot run without an image, and its Q-Former reads the prompt",
    "paligemma": "its processor marks prompt and answer as one block that attends in both "
    "directions: answers would leak into their own prediction",
    "chameleon": "it masks some logits after its head",
    "bloom": "its ALiBi table joins rows and heads in one dimension",
}
"""Model types that cannot be cut, with the reason."""


def family_of(model_type: str) -> Family:
    """The family of a model type; one that is not listed is analysed by structure.

    Args:
        model_type: `model_type` of the config.

    Returns:
        The family's record.

    Raises:
        UnsupportedModelError: For a type that is known not to work, with the reason.
    """
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"a model must be a decoder that can be cut between layers; {model_type!r} cannot: "
            f"{REFUSED[model_type]}."
        )
    return FAMILIES.get(model_type) or generic(model_type)


def list_families() -> dict[str, str]:
    """List the families that have a record of their own.

    Other image-text-to-text models and decoders of Hugging Face are found by structure.

    Returns:
        `config.model_type` to title.
    """
    return {name: family.title for name, family in FAMILIES.items()}


def tiny_families() -> dict[str, TinyModel]:
    """List the families that have a tiny model.

    Returns:
        Name of the tiny model (the model type without hyphens) to its description.
    """
    return {name.replace("-", ""): family.tiny for name, family in FAMILIES.items() if family.tiny}
