"""Hashes of parameters: how a delta knows the base it was made for.

A hash is computed once per tensor and remembered for as long as the tensor lives and is not written
to. The parameters that `bind` makes remember the base's parameter they stand for.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from errata.functional.errors import InvalidInputError
from errata.functional.queries import Image

__all__ = ["base_parameter", "content_id", "hash_parameter", "mark_edited"]

_CHUNK = 1 << 25  # bytes brought to the CPU at a time


class _CachedDigest(NamedTuple):
    version: int
    digest: str


_cached_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_base_parameters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def hash_parameter(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, in hexadecimal.

    Device and strides do not matter, the dtype does. Reading 1 GB takes about a second, once: the
    digest is kept until the tensor is written to.

    >>> hash_parameter(torch.zeros(2))[:16]
    'af5570f5a1810b7a'

    Args:
        tensor: Tensor of any shape and dtype.

    Returns:
        64 hexadecimal digits.
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
    """Remember that `tensor` is an edited form of `base`.

    Args:
        tensor: The edited parameter.
        base: The parameter it was made from, itself edited or not.

    Returns:
        `tensor`.
    """
    with _lock:
        unedited = _base_parameters.get(base)
        _base_parameters[tensor] = base if unedited is None else unedited
    return tensor


def base_parameter(tensor: Tensor) -> Tensor:
    """The unedited parameter from which `bind` made this one.

    Args:
        tensor: A parameter, edited or not.

    Returns:
        The unedited parameter; `tensor` itself if it was never edited.
    """
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


# EXIF orientation to PIL's `Image.Transpose`, by number: this floor does not import PIL.
_TRANSPOSES = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def _file_digest(path: str | os.PathLike[str]) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise InvalidInputError(
                f"image {os.fspath(path)!r} must be a file, and is a pipe or a device."
            )
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"image {os.fspath(path)!r} must be a file that can be read ({reason}): check the path "
            "or the image root."
        ) from error


def content_id(image: Image) -> str:
    """Name an image by its content. The one identity of an image in records, caches and logs.

    Args:
        image: A PIL image, a path, or an object with a `content_id`.

    Returns:
        Its own `content_id`, sha256 of a file's bytes, or of a PIL image's size and RGB pixels with
        its EXIF orientation applied.

    Raises:
        InvalidInputError: If the file cannot be read, or it is no image.
    """
    identifier = getattr(image, "content_id", None)
    if isinstance(identifier, str):
        return identifier
    if isinstance(image, str | os.PathLike):
        return _file_digest(image)
    if not hasattr(image, "getexif"):
        raise InvalidInputError(
            "an image must be a PIL image, a path, or an object with .load() and .content_id; got "
            f"a {type(image).__name__}."
        )
    transpose = _TRANSPOSES.get(image.getexif().get(0x0112, 1))
    upright = image if transpose is None else image.transpose(transpose)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # Pillow warns on the direct way
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        # converting these to RGB would clip them: two images could get one name
        head = f"{upright.mode} {upright.size[0]}x{upright.size[1]} ".encode()
        return hashlib.sha256(head + upright.tobytes()).hexdigest()
    upright = upright.convert("RGB")
    head = f"RGB {upright.size[0]}x{upright.size[1]} ".encode()
    return hashlib.sha256(head + upright.tobytes()).hexdigest()
