"""What a model family is, as data: how its forward is entered, its positions, its places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errata.adapters.inputs.vision_inputs import ProcessorParts
from errata.functional import Inputs

__all__ = ["Family", "enter", "forward_arguments", "mask_positions", "sequential_positions"]


def forward_arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What the Hugging Face forward of most families is called with, positions aside."""
    del module
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask.long(),
        **inputs.vision_inputs,
    }


def enter(module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """Run the module's own forward; a family that must enter elsewhere has its own."""
    return module(**kwargs, use_cache=False, return_dict=True)


def sequential_positions(module: nn.Module, inputs: Inputs) -> Tensor:
    """Positions 0, 1, 2, ... of every row [B 1 L], as most decoders count."""
    del module
    num_rows, length = inputs.input_ids.shape
    return torch.arange(length, device=inputs.input_ids.device).expand(num_rows, 1, length)


def mask_positions(module: nn.Module, inputs: Inputs) -> Tensor:
    """Positions that count real tokens [B 1 L], as OPT has it; padding repeats the last."""
    del module
    return (inputs.attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, None]


class Family(NamedTuple):
    """One model type. Everything has a default that is right for the usual Hugging Face layout.

    `positions` is None where the module's own choice must be observed instead of set. `known` are
    config attributes that the family handles or that change nothing, beside those its config class
    declares; `values` names config attributes (dotted) with the values the adapter is right for.
    """

    model_type: str
    forward_arguments: Callable[[nn.Module, Inputs], dict[str, Any]] = forward_arguments
    enter: Callable[[nn.Module, Mapping[str, Any]], Any] = enter
    position_ids: Callable[[nn.Module, Inputs], Tensor] | None = sequential_positions
    vision_path: str = ""  # path of the vision tower
    projector_path: str = ""  # path of what maps its features to the decoder
    vision_features_path: str | None = (
        None  # path of the module whose `get_image_features` does both
    )
    takes_images: bool = True
    takes_several_images: bool = True
    takes_videos: bool = False
    known_attributes: frozenset[str] = frozenset()
    required_values: Mapping[str, tuple[Any, ...]] = {}
    verified: bool = True  # False: found by structure, so it must prove itself


def image_token(parts: ProcessorParts) -> str:
    return parts.processor.image_token


def video_token(parts: ProcessorParts) -> str:
    return parts.processor.video_token


def set_special_tokens(processor: Any, tokenizer: Any, **default: str) -> None:
    for name, token in default.items():
        token = getattr(tokenizer, name, None) or token
        setattr(processor, name, token)
        setattr(processor, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
