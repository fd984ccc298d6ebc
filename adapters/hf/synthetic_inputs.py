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
SECOND_SHAPE = ProbeShape(num_rows=3, query_length=3, key_length=7)  # after four cached tokens
LONG_SHAPE = ProbeShape(num_rows=3, query_length=7, key_length=7)  # where no past can be had


def synthetic_tokens(card: ModelCard, module: nn.Module, shape: ProbeShape) -> Inputs:
    """Rows of ordinary tokens, nothing scored; the last row is one token shorter.

    Args:
        card: The model's card.
        module: The model.
        shape: Rows and tokens.

    Returns:
        Inputs.
    """
    special_ids = {
        value
        for config in (module.config, text_config(module.config))
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    plain_ids = [token for token in range(min(card.vocab_size, 256)) if token not in special_ids]
    order = (
        torch.arange(shape.num_rows * shape.query_length, dtype=torch.int64, device="cpu")
        * 7
        % len(plain_ids)
    )
    device = next(module.parameters()).device
    input_ids = (
        torch.tensor(plain_ids, dtype=torch.int64, device="cpu")[order]
        .reshape(shape.num_rows, shape.query_length)
        .to(device)
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
    """A cache without keys, of the second probe's length: enough to make masks and positions.

    Args:
        like: A tensor on the right device.
        num_axes: P, axes of a position.

    Returns:
        The cache.
    """
    length = SECOND_SHAPE.key_length - SECOND_SHAPE.query_length
    attention_mask = torch.ones(SECOND_SHAPE.num_rows, length, dtype=torch.bool, device=like.device)
    return KVCache(
        (),
        (),
        attention_mask,
        torch.full(
            (SECOND_SHAPE.num_rows, num_axes), length, device=like.device, dtype=torch.int64
        ),
    )


def hf_position_ids(position_ids: Tensor) -> Tensor:
    """Positions as Hugging Face takes them.

    Args:
        position_ids: [B P L].

    Returns:
        [B L] for one axis, [P B L] for several.
    """
    return position_ids[:, 0] if position_ids.shape[1] == 1 else position_ids.transpose(0, 1)


def observed_positions(position_ids: Tensor | None, inputs: Inputs) -> Tensor:
    """Positions as the decoder was given them, or 0, 1, 2, ... if it was given none.

    Args:
        position_ids: What the decoder was given.
        inputs: Preprocessed rows.

    Returns:
        [B P L].
    """
    num_rows, length = inputs.input_ids.shape
    if position_ids is None:
        return torch.arange(length, device=inputs.input_ids.device, dtype=torch.int64).expand(
            num_rows, 1, length
        )
    if position_ids.ndim == 3:
        return position_ids.transpose(0, 1).expand(num_rows, -1, -1)
    return position_ids.reshape(-1, 1, length).expand(num_rows, 1, length)
