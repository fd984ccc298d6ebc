"""The models that come with the package, and the names of what can be loaded; torch comes late."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.functional.errors import InvalidInputError

if TYPE_CHECKING:
    from errata.functional import Model

    from .text import PromptTemplate

__all__ = ["list_families", "load_micro", "micro_names"]

_FAMILY_DESCRIPTIONS = {
    "blip-2": "BLIP-2 over a decoder (OPT, Llama)",
    "minigpt4": "MiniGPT-4: BLIP-2's vision over Llama/Vicuna",
    "llava": "LLaVA-1.5",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "gpt2": "GPT-2 (text)",
    "llama": "Llama, Vicuna (text)",
    "qwen2": "Qwen2 and Qwen2.5 (text)",
    "qwen3": "Qwen3 (text)",
    "opt": "OPT (text)",
}


def list_families() -> dict[str, str]:
    """`config.model_type` of each family with an adapter of its own, and what it is.

    Other image-text-to-text models and decoders of Hugging Face are found by structure.
    """
    return dict(_FAMILY_DESCRIPTIONS)


def micro_names() -> tuple[str, ...]:
    """The names that `micro` takes."""
    from . import zoo

    return zoo.micro_names()


def load_micro(name: str, template: str | PromptTemplate = "default") -> Model:
    """A small trained model of the drawn world, as shipped: offline, in well under a second.

    Raises BadInput with the names there are.

    >>> from errata import adapters
    >>> adapters.load_micro("llava").card.family
    'llava'
    """
    if name not in micro_names():
        raise InvalidInputError(
            f"a micro model must be one of {', '.join(micro_names()) or '(none is installed)'}; "
            f"got {name!r}."
        )
    from . import zoo
    from .load import from_module

    module, processor = zoo.load_micro_parts(name)
    return from_module(module, processor, template=template, id=f"micro/{name}")
