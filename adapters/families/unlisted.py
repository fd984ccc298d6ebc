"""The default `Family` of a model type found by structure."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from errata.adapters.families.base import Family
from errata.functional import Inputs

__all__ = ["forward_arguments", "generic"]


def forward_arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Ids, mask and pixels; token types where the forward takes them and the processor gave none.

    Args:
        module: The model.
        inputs: Preprocessed rows.

    Returns:
        Keyword arguments.
    """
    kwargs: dict[str, Any] = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask.long(),
    }
    parameters = inspect.signature(module.forward).parameters
    if "mm_token_type_ids" in parameters and inputs.image_mask.any():
        config: Any = module.config
        video = getattr(config, "video_token_id", None)
        token_types = inputs.image_mask.int()
        kwargs["mm_token_type_ids"] = (
            token_types + (inputs.input_ids == video).int() if video else token_types
        )
    vision_inputs = {
        name: value for name, value in inputs.vision_inputs.items() if name != "labels"
    }
    return {**kwargs, **vision_inputs}


def generic(model_type: str) -> Family:
    """The record of a model type that is not listed.

    Args:
        model_type: `model_type` of the config.

    Returns:
        The record.
    """
    return Family(
        model_type, forward_arguments=forward_arguments, position_ids=None, verified=False
    )
