"""From a Hugging Face processor to the function that turns queries into inputs."""

from __future__ import annotations

from typing import Any

from errata.adapters.families.table import FAMILIES
from errata.adapters.inputs.hf_processor import HFQueryProcessor
from errata.adapters.inputs.processor import QueryProcessor
from errata.adapters.inputs.prompt_format import PromptTemplate
from errata.adapters.inputs.templates import get_template
from errata.adapters.inputs.vision_inputs import TEXT_ONLY, split_processor
from errata.functional import ModelCard
from errata.functional.errors import UnsupportedModelError
from errata.functional.types import Preprocess

__all__ = ["make_processor"]


def make_processor(
    processor: Any,
    config: Any,
    card: ModelCard,
    template: str | PromptTemplate = "default",
    cache: int = 256 << 20,
) -> Preprocess:
    """Make the function that turns queries into inputs.

    Families with a `VisionFormat` and text decoders use `QueryProcessor`. Any other model is read
    through its own processor (`HFQueryProcessor`).

    Args:
        processor: The Hugging Face processor, or a tokenizer.
        config: The model's config.
        card: The model's card.
        template: A template or its name.
        cache: Memory for preprocessed images, in bytes.

    Returns:
        A function of queries.

    Raises:
        InvalidSettingsError: If the template is unknown.
        UnsupportedModelError: If the processor has no image processor.
    """
    family = FAMILIES.get(config.model_type)
    prompt_template = get_template(template, family.templates if family else {})
    parts = split_processor(processor, config)
    vision_format = family.vision if family else None
    if parts.processor is None or not card.takes_images:
        return QueryProcessor(parts, TEXT_ONLY, prompt_template, card, cache)
    if vision_format is None:
        return HFQueryProcessor(parts, prompt_template, card)
    if parts.image_processor is None:
        raise UnsupportedModelError(
            f"a {config.model_type} must come with a processor that has an image processor; "
            f"{type(processor).__name__} has none."
        )
    return QueryProcessor(parts, vision_format, prompt_template, card, cache)
