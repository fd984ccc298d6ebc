"""What a model does to logits behind its head: nothing, a scale, or a soft cap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from errata.functional.errors import ModelUnsupported

__all__ = ["ending"]

_ENDINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
}
"""Config attribute -> what a model with it does to its logits (Gemma 2, Cohere, Granite)."""


def ending(
    configs: list[Any], raw: Tensor, wanted: Tensor, name: str
) -> Callable[[Tensor], Tensor]:
    """The function that takes the head's output to the model's logits, tried on one forward.

    Raises ModelUnsupported where none does.
    """
    tries: list[Callable[[Tensor], Tensor]] = [lambda logits: logits]
    for attribute, apply in _ENDINGS.items():
        for config in configs:
            value = getattr(config, attribute, None)
            if isinstance(value, int | float) and value:
                tries.append(lambda logits, apply=apply, value=value: apply(logits, value))
    for attempt in tries:
        if torch.allclose(attempt(raw), wanted, rtol=1e-4, atol=1e-5):
            return attempt
    raise ModelUnsupported(
        f"{name} must give logits that are its head's output, scaled or soft-capped by its config; "
        f"they differ by {float((raw - wanted).abs().max()):.2g}."
    )
