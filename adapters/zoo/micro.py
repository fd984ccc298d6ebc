"""The models that come with the package, and the names of what can be loaded; torch comes late.

The micro zoo: a drawn world, and small models of real Hugging Face classes that know it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from errata.adapters.zoo.assets import WEIGHTS
from errata.functional.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    from errata.adapters.inputs.prompt_format import PromptTemplate
    from errata.functional import Model

__all__ = ["load_micro", "load_micro_parts", "micro_names"]


def load_micro(name: str, template: str | PromptTemplate = "default") -> Model:
    """Load a small trained model of the synthetic world, which comes with the package.

    Args:
        name: "llava", "blip2" or "qwen2_vl".
        template: A prompt template or the name of one.

    Returns:
        The model.

    Raises:
        InvalidInputError: If there is no such model, with those there are.

    Example:
        >>> from errata import adapters
        >>> adapters.load_micro("llava").card.family
        'llava'
    """
    if name not in micro_names():
        raise InvalidInputError(
            f"a micro model must be one of {', '.join(micro_names()) or '(none is installed)'}; "
            f"got {name!r}."
        )
    from errata.adapters.loading.load import from_module

    module, processor = load_micro_parts(name)
    return from_module(module, processor, template=template, id=f"micro/{name}")


def micro_names() -> tuple[str, ...]:
    """The micro models that are shipped, by name.

    >>> "llava" in micro_names()
    True
    """
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/model.safetensors")))


def load_micro_parts(name: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a shipped micro model and its processor.

    Reads one folder of this package, never the network; works without torchvision. The fp16 weights
    are loaded as `dtype`, float32 by default.

    Args:
        name: Name in `micro_names()`.
        dtype: Dtype of the weights.

    Returns:
        The Hugging Face module in eval mode, and the processor.

    Raises:
        UnsupportedModelError: For a name that is not shipped.
    """
    if name not in micro_names():
        from errata.functional.errors import UnsupportedModelError

        raise UnsupportedModelError(
            f"no micro model is named {name!r}; there are {', '.join(micro_names()) or 'none'}."
        )
    import torch
    from tokenizers import Tokenizer
    from transformers.utils import logging

    from errata.adapters.zoo.configs import MICRO, fast_tokenizer

    micro, folder = MICRO[name], WEIGHTS / name
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar over a hundredth of a second is noise
    try:
        module = micro.module.from_pretrained(
            folder, dtype=torch.float32 if dtype is None else dtype, local_files_only=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return module.eval(), micro.processor(fast_tokenizer(tokenizer, **micro.special_tokens))
