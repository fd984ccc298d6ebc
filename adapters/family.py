"""What a model family is, as data: how its forward is entered, its positions, its places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errata.functional import Inputs

__all__ = ["Family", "arguments", "counted", "enter", "from_mask"]


def arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What the Hugging Face forward of most families is called with, positions aside."""
    del module
    return {"input_ids": inputs.ids, "attention_mask": inputs.mask.long(), **inputs.pixels}


def enter(module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """Run the module's own forward; a family that must enter elsewhere has its own."""
    return module(**kwargs, use_cache=False, return_dict=True)


def counted(module: nn.Module, inputs: Inputs) -> Tensor:
    """Positions 0, 1, 2, ... of every row [B 1 L], as most decoders count."""
    del module
    rows, length = inputs.ids.shape
    return torch.arange(length, device=inputs.ids.device).expand(rows, 1, length)


def from_mask(module: nn.Module, inputs: Inputs) -> Tensor:
    """Positions that count real tokens [B 1 L], as OPT has it; padding repeats the last."""
    del module
    return (inputs.mask.long().cumsum(-1) - 1).clamp(min=0)[:, None]


class Family(NamedTuple):
    """One model type. Everything has a default that is right for the usual Hugging Face layout.

    `positions` is None where the module's own choice must be observed instead of set. `known` are
    config attributes that the family handles or that change nothing, beside those its config class
    declares; `values` names config attributes (dotted) with the values the adapter is right for.
    """

    model_type: str
    arguments: Callable[[nn.Module, Inputs], dict[str, Any]] = arguments
    enter: Callable[[nn.Module, Mapping[str, Any]], Any] = enter
    positions: Callable[[nn.Module, Inputs], Tensor] | None = counted
    vision: str = ""  # path of the vision tower
    projector: str = ""  # path of what maps its features to the decoder
    features: str | None = None  # path of the module whose `get_image_features` does both
    images: bool = True
    several: bool = True
    videos: bool = False
    known: frozenset[str] = frozenset()
    values: Mapping[str, tuple[Any, ...]] = {}
    explicit: bool = True  # False: found by structure, so it must prove itself
