"""Pack, unpack and scatter bit masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack_bits", "scatter_values", "unpack_bits"]

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device="cpu")


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask into bytes, the lowest bit first.

    >>> pack_bits(torch.tensor([True, False, True] + [False] * 5 + [True]))
    tensor([5, 1], dtype=torch.uint8)

    Args:
        mask: [..., N] of bool.

    Returns:
        [..., ceil(N/8)] of uint8.
    """
    bits = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits * _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, size: int) -> Tensor:
    """Unpack bytes into a boolean mask.

    Args:
        mask: [..., ceil(N/8)] of uint8.
        size: N.

    Returns:
        [..., N] of bool.
    """
    bits = mask[..., None].bitwise_and(_BITS.to(mask.device)) > 0
    return bits.flatten(-2)[..., :size]


def scatter_values(mask: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Put values at the bits that are set in a packed mask.

    >>> scatter_values(torch.tensor([5], dtype=torch.uint8), torch.tensor([2.0, 3.0]), (2, 2))
    tensor([[2., 0.],
            [3., 0.]])

    Args:
        mask: Packed mask of O*I bits.
        values: One value per bit that is set, [K].
        size: (O, I).

    Returns:
        [O I], 0 elsewhere.
    """
    out, inner = size
    full = values.new_zeros(out * inner)
    full[unpack_bits(mask, out * inner)] = values
    return full.view(out, inner)
