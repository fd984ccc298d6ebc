"""Pack, unpack and scatter bit masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack_bits", "scatter_values", "unpack_bits"]

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """A mask [... N] of bool as bytes [... ceil(N/8)], the lowest bit first.

    >>> pack_bits(torch.tensor([True, False, True] + [False] * 5 + [True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    bits = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits * _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, size: int) -> Tensor:
    """[... ceil(N/8)] bytes as [... N] of bool."""
    bits = mask[..., None].bitwise_and(_BITS.to(mask.device)) > 0
    return bits.flatten(-2)[..., :size]


def scatter_values(mask: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values [K] at the K bits set in a mask of bytes: the map [O I].

    >>> scatter_values(torch.tensor([5], dtype=torch.uint8), torch.tensor([2.0, 3.0]), (2, 2))
    tensor([[2., 0.],
            [3., 0.]])
    """
    out, inner = size
    full = values.new_zeros(out * inner)
    full[unpack_bits(mask, out * inner)] = values
    return full.view(out, inner)
