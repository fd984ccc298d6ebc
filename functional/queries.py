"""Questions and edits as people state them. Free of torch: benchmarks are read and checked without.

The names are those of `errata.functional.types`, which holds everything made of tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["IMAGE_PLACEHOLDER", "Case", "EncodedImage", "Image", "Query", "as_png", "open_pngs"]

IMAGE_PLACEHOLDER = "<image>"
"""In a prompt: a picture stands here."""

Image = Any
"""A PIL image, a path, or anything with `.load() -> PIL.Image` and `.content_id: str` (a content name)."""


class Query(NamedTuple):
    """One question and the answer wanted: the unit of editing, probing and training.

    `images` are in the order in which the prompt refers to them; with `video=True` they are the
    frames of one video. `target` may be empty only where nothing is scored (generation). `aliases`
    are other answers that count as right where a model is left to talk; none of them is taught, nor
    scored under teacher forcing.
    """

    prompt: str
    target: str = ""
    images: tuple[Image, ...] = ()
    video: bool = False
    aliases: tuple[str, ...] = ()


class Case(NamedTuple):
    """One edit and what is asked before and after it; probe names are metric names."""

    id: str
    edit: Query
    probes: Mapping[str, tuple[Query, ...]] = {}


_PNG: list[tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = []


def open_pngs(write: Callable[[Any], bytes], read: Callable[[bytes], Any]) -> None:
    """Say how pictures become PNG files and back: the adapters do, who know pictures."""
    _PNG[:] = [(write, read)]


def as_png(image: Any) -> bytes:
    """A picture as the bytes of a PNG file."""
    return _PNG[0][0](image)


class EncodedImage(NamedTuple):
    """A picture out of a delta file, named by its content."""

    data: bytes
    content_id: str

    def load(self) -> Any:
        """Decode it."""
        return _PNG[0][1](self.data)


def _encoded_image(data: bytes) -> EncodedImage:
    return EncodedImage(data, hashlib.sha256(data).hexdigest())
