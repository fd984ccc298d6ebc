"""Tensors by key, least recently used dropped beyond a byte limit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["LRUCache"]


def _num_bytes(value: Any) -> int:
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, (tuple, list)):
        return sum(map(_num_bytes, value))
    return 0


class LRUCache:
    """Values by key, the least recently used dropped when their tensors outgrow `limit` bytes.

    Several threads may share one; two that miss the same key at once both compute it.
    """

    def __init__(self, max_bytes: int = 256 << 20):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Get a value, computed now if it is not cached.

        Args:
            key: Key of the value.
            make: Computes it.

        Returns:
            The value.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        size = _num_bytes(value)
        with self._lock:
            if key not in self._values and size <= self.max_bytes:
                self._values[key] = value
                self.num_bytes += size
                while self.num_bytes > self.max_bytes:
                    self.num_bytes -= _num_bytes(self._values.popitem(last=False)[1])
        return value

    def __len__(self) -> int:
        return len(self._values)
