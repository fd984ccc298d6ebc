"""An attention function that works under vmap, and the matching masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["EXPLICIT_ATTENTION"]

EXPLICIT_ATTENTION = "errata_explicit"
"""Attention by SDPA with a mask that is always written out."""


def _explicit_mask(
    *args: Any, mask_function: Callable, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    kwargs["allow_is_causal_skip"] = False
    if attention_mask is not None and kwargs.get("q_offset", 0):
        mask_function = _by_token_position(attention_mask, mask_function)
    return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _by_token_position(attention_mask: Tensor, mask_function: Callable) -> Callable:
    """Let a mask pattern count real tokens instead of cache slots.

    Rows of different lengths are right-padded, so after a padded cache the slot of a token is not
    its place in the row; sliding windows and chunks are patterns over places.
    """
    token_positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def mask_by_position(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(
            batch, head, token_positions[batch, query], token_positions[batch, key]
        )

    return mask_by_position


def _explicit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T scale + mask) v: fused, or plain where vmap, a cap or sinks forbid that.

    `softcap` c bounds scores to c tanh(score / c) (Gemma 2); `s_aux` [H] are scores of sinks that
    take weight and give nothing (gpt-oss).
    """
    special = softcap is not None or s_aux is not None
    if not special and not any(map(_is_vmapped, (query, key, value, attention_mask))):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)  # [B H Q K]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[-2]]
    return (weights @ value).transpose(1, 2).contiguous(), None


def _is_vmapped(tensor: Tensor | None) -> bool:
    while tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def set_attention(decoder: nn.Module, attention: str) -> None:
    """Set the attention implementation of every config in a decoder, without touching its parents.

    Args:
        decoder: The decoder.
        attention: `sdpa` or `eager`.
    """
    for part in decoder.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = attention  # type: ignore[union-attr]
        if "_attn_implementation" in vars(part):
            vars(part)["_attn_implementation"] = attention
