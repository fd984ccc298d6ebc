"""What a model does to logits after its head: nothing, a scale, or a soft cap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from errata.functional.errors import UnsupportedModelError

__all__ = ["find_logit_transform"]

_LOGIT_TRANSFORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
}
"""Config attribute -> what a model with it does to its logits (Gemma 2, Cohere, Granite)."""


def find_logit_transform(
    configs: list[Any], head_output: Tensor, expected: Tensor, name: str
) -> Callable[[Tensor], Tensor]:
    """Find the function that takes the head's output to the model's logits, tried on one forward.

    Args:
        configs: Configs that may hold a scale or a soft cap.
        head_output: Output of the head.
        expected: Logits of the model.
        name: Name of the model, for the message.

    Returns:
        The function.

    Raises:
        UnsupportedModelError: If no known function does.
    """
    candidates: list[Callable[[Tensor], Tensor]] = [lambda logits: logits]
    for attribute, apply in _LOGIT_TRANSFORMS.items():
        for config in configs:
            value = getattr(config, attribute, None)
            if isinstance(value, int | float) and value:
                candidates.append(lambda logits, apply=apply, value=value: apply(logits, value))
    for candidate in candidates:
        if torch.allclose(candidate(head_output), expected, rtol=1e-4, atol=1e-5):
            return candidate
    raise UnsupportedModelError(
        f"{name} must give logits that are its head's output, scaled or soft-capped by its config; "
        f"they differ by {float((head_output - expected).abs().max()):.2g}."
    )
