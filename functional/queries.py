"""Questions and edits as people state them. Free of torch: benchmarks are read and checked without.

The names are those of `errata.functional.types`, which holds everything made of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["IMAGE_PLACEHOLDER", "Case", "Image", "Query"]

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
