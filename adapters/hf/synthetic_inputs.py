"""Small synthetic inputs that show how a module is wired, and how positions are written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errata.adapters.hf.layout import ProbeShape
from errata.adapters.hf.structure import text_config
from errata.functional import IGNORE_INDEX, Inputs, KVCache, ModelCard

__all__ = [
    "FIRST_SHAPE",
    "LONG_SHAPE",
    "SECOND_SHAPE",
    "empty_cache",
    "hf_position_ids",
    "observed_positions",
    "synthetic_tokens",
]

FIRST_SHAPE = ProbeShape(num_rows=2, query_length=5, key_length=5)
SECOND_SHAPE = ProbeShape(num_rows=3, query_length=3, key_length=7)  # behind a past of four tokens
LONG_SHAPE = ProbeShape(num_rows=3, query_length=7, key_length=7)  # where no past can be had


def synthetic_tokens(card: ModelCard, module: nn.Module, shape: ProbeShape) -> Inputs:
    """Token rows clear of special ones, nothing scored; the last row is one token shorter."""
    special_ids = {
        value
        for config in (module.config, text_config(module.config))
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    plain_ids = [token for token in range(min(card.vocab_size, 256)) if token not in special_ids]
    order = torch.arange(shape.num_rows * shape.query_length) * 7 % len(plain_ids)
    device = next(module.parameters()).device
    input_ids = (
        torch.tensor(plain_ids)[order].reshape(shape.num_rows, shape.query_length).to(device)
    )
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    attention_mask[-1, -1] = False
    logit_positions = torch.zeros_like(input_ids[:, :1])
    return Inputs(
        input_ids,
        attention_mask,
        torch.zeros_like(attention_mask),
        torch.full_like(logit_positions, IGNORE_INDEX),
        logit_positions,
    )


def empty_cache(like: Tensor, num_axes: int) -> KVCache:
    """A past of the grown probe's length with no keys in it: enough to make masks and positions."""
    length = SECOND_SHAPE.key_length - SECOND_SHAPE.query_length
    attention_mask = torch.ones(SECOND_SHAPE.num_rows, length, dtype=torch.bool, device=like.device)
    return KVCache(
        (),
        (),
        attention_mask,
        torch.full((SECOND_SHAPE.num_rows, num_axes), length, device=like.device),
    )


def hf_position_ids(position_ids: Tensor) -> Tensor:
    """[B P L] as Hugging Face has it: [B L], or [P B L] for several axes."""
    return position_ids[:, 0] if position_ids.shape[1] == 1 else position_ids.transpose(0, 1)


def observed_positions(position_ids: Tensor | None, inputs: Inputs) -> Tensor:
    """[B P L] from what the decoder was given, or counted where it was given nothing."""
    num_rows, length = inputs.input_ids.shape
    if position_ids is None:
        return torch.arange(length, device=inputs.input_ids.device).expand(num_rows, 1, length)
    if position_ids.ndim == 3:
        return position_ids.transpose(0, 1).expand(num_rows, -1, -1)
    return position_ids.reshape(-1, 1, length).expand(num_rows, 1, length)
