"""A `transformers` cache that never writes to the past it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

__all__ = ["FunctionalKVCache"]


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
        """Append the keys and values of one layer.

        Args:
            key_states: New keys.
            value_states: New values.
            layer_idx: Number of the layer.
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            All keys and values of the layer.
        """
        states = (key_states, value_states)
        if self.past_states is not None:
            keys, values = self.past_states
            states = torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)
        self.layer_states.append(states)
        return states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens.

        Args:
            layer_idx: Number of the layer.

        Returns:
            Tokens.
        """
        return self.past_length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new token.

        Args:
            layer_idx: Number of the layer.

        Returns:
            Tokens before it.
        """
        return self.past_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers.

        Args:
            query_length: New tokens.
            layer_idx: Number of the layer.

        Returns:
            (length, offset).
        """
        return self.past_length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Largest number of tokens; -1 for no limit.

        Args:
            layer_idx: Number of the layer.

        Returns:
            -1.
        """
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
