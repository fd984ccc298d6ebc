"""Skeletons: per-thread copies of a module's structure that share its weights.

`functional_call` swaps parameters inside the module object, so one module must not run in two
threads at once, and rewrites hang on it as hooks. Each thread therefore gets its own tree of
modules; parameters and buffers are the base's own tensors, so a skeleton costs no weights.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["EXPLICIT_ATTENTION", "FunctionalKVCache", "ThreadReplicas", "replaced_forwards"]

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

    Rows of different lengths are right-padded, so behind a padded past the slot of a token is not
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


AttentionInterface.register(EXPLICIT_ATTENTION, _explicit_attention)
AttentionMaskInterface.register(EXPLICIT_ATTENTION, _explicit_mask)


class FunctionalKVCache(Cache):
    """A key-value cache for one decode: joins what is new to a past it never writes."""

    def __init__(self, num_layers: int, past_length: int = 0) -> None:
        super().__init__(layers=[])
        self.past_length = past_length  # tokens of the past
        self.past_states: tuple[Tensor, Tensor] | None = None  # of the layer that is running
        self.layer_states: list[tuple[Tensor, Tensor]] = []  # of each layer that has run
        self._num_layers = num_layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = (key_states, value_states)
        if self.past_states is not None:
            keys, values = self.past_states
            states = torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)
        self.layer_states.append(states)
        return states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past_length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past_length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return self._num_layers

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self._num_layers


class ThreadReplicas:
    """One skeleton of `module` per thread, made when a thread first asks.

    `attention` is set on the configs below `decoder` only, so that vision towers run as they
    came; None leaves them all. The master copy is never run, the base module never touched.
    """

    def __init__(self, module: nn.Module, decoder: str, attention: str | None) -> None:
        self._shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self._prototype = self._copy(module)
        self._prototype.eval()
        if attention is not None:
            set_attention(self._prototype.get_submodule(decoder), attention)
        self._local = threading.local()

    def get(self) -> nn.Module:
        if not hasattr(self._local, "module"):
            self._local.module = self._copy(self._prototype)
        return self._local.module

    def _copy(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module, dict(self._shared))


def set_attention(decoder: nn.Module, attention: str) -> None:
    """Choose the attention of every config below a decoder, without touching its parents."""
    for part in decoder.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = attention  # type: ignore[union-attr]
        if "_attn_implementation" in vars(part):
            vars(part)["_attn_implementation"] = attention


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable]) -> Iterator[None]:
    """Within the block, each module runs the forward given for it instead of its own."""
    originals = [
        vars(module).get("forward") for module in modules
    ]  # accelerate keeps its own there
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, original in zip(modules, originals):
            if original is None:
                vars(module).pop("forward", None)
            else:
                module.forward = original
