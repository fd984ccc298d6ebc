"""Small synthetic inputs that show how a module is wired, and how positions are written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errata.functional import IGNORE, Inputs, ModelCard, Past

from .plan import Sizes
from .structure import text_config

__all__ = ["FIRST", "GROWN", "LONGER", "as_hugging_face", "empty_past", "observed", "tokens"]

FIRST = Sizes(rows=2, query=5, keys=5)
GROWN = Sizes(rows=3, query=3, keys=7)  # behind a past of four tokens
LONGER = Sizes(rows=3, query=7, keys=7)  # where no past can be had


def tokens(card: ModelCard, module: nn.Module, sizes: Sizes) -> Inputs:
    """Token rows clear of special ones, nothing scored; the last row is one token shorter."""
    special = {
        value
        for config in (module.config, text_config(module.config))
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    plain = [token for token in range(min(card.vocab, 256)) if token not in special]
    order = torch.arange(sizes.rows * sizes.query) * 7 % len(plain)
    device = next(module.parameters()).device
    ids = torch.tensor(plain)[order].reshape(sizes.rows, sizes.query).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, -1] = False
    at = torch.zeros_like(ids[:, :1])
    return Inputs(ids, mask, torch.zeros_like(mask), torch.full_like(at, IGNORE), at)


def empty_past(like: Tensor, axes: int) -> Past:
    """A past of the grown probe's length with no keys in it: enough to make masks and positions."""
    length = GROWN.keys - GROWN.query
    mask = torch.ones(GROWN.rows, length, dtype=torch.bool, device=like.device)
    return Past((), (), mask, torch.full((GROWN.rows, axes), length, device=like.device))


def as_hugging_face(positions: Tensor) -> Tensor:
    """[B P L] as Hugging Face has it: [B L], or [P B L] for several axes."""
    return positions[:, 0] if positions.shape[1] == 1 else positions.transpose(0, 1)


def observed(positions: Tensor | None, inputs: Inputs) -> Tensor:
    """[B P L] from what the decoder was given, or counted where it was given nothing."""
    rows, length = inputs.ids.shape
    if positions is None:
        return torch.arange(length, device=inputs.ids.device).expand(rows, 1, length)
    if positions.ndim == 3:
        return positions.transpose(0, 1).expand(rows, -1, -1)
    return positions.reshape(-1, 1, length).expand(rows, 1, length)
