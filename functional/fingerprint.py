"""Hashes of parameters: how a delta knows the base it was made for.

A hash is computed once per tensor and remembered for as long as the tensor lives and is not written
to. The parameters that `bind` makes remember the base's parameter they stand for.
"""

from __future__ import annotations

import hashlib
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["mark_edited", "hash_parameter", "base_parameter"]

_CHUNK = 1 << 25  # bytes brought to the CPU at a time


class _CachedDigest(NamedTuple):
    version: int
    digest: str


_cached_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_base_parameters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def hash_parameter(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in row-major order, in hexadecimal.

    Device and strides do not matter, dtype does. Reading 1 GB takes about a second, once.

    >>> hash_parameter(torch.zeros(2))[:16]
    'af5570f5a1810b7a'
    """
    version = -1 if tensor.is_inference() else tensor._version
    with _lock:
        cached = _cached_digests.get(tensor)
    if cached is not None and cached.version == version:
        return cached.digest
    digest = _digest(tensor)
    with _lock:
        _cached_digests[tensor] = _CachedDigest(version, digest)
    return digest


def mark_edited(tensor: Tensor, base: Tensor) -> Tensor:
    """Remember that `tensor` is an edited form of `base`; returns `tensor`."""
    with _lock:
        unedited = _base_parameters.get(base)
        _base_parameters[tensor] = base if unedited is None else unedited
    return tensor


def base_parameter(tensor: Tensor) -> Tensor:
    """The unedited parameter behind one that `bind` made; any other tensor is its own origin."""
    with _lock:
        unedited = _base_parameters.get(tensor)
    return tensor if unedited is None else unedited


def _digest(tensor: Tensor) -> str:
    state = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    step = max(1, _CHUNK // max(1, flat.element_size()))
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step].cpu().contiguous()
        state.update(part.view(torch.uint8).numpy().data)
    return state.hexdigest()
