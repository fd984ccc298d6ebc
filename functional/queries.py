"""Queries, cases and images. No torch, so benchmarks are read and verified without it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "IMAGE_PLACEHOLDER",
    "VIDEO_PLACEHOLDER",
    "Case",
    "EncodedImage",
    "Image",
    "Query",
    "encoded_image",
]

IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of an image in a prompt."""

VIDEO_PLACEHOLDER = "<video>"
"""Marks the place of the video in a prompt; `<image>` does too."""

Image = Any
"""A PIL image, a path, an `EncodedImage`, or an object with `.load() -> PIL.Image` and
`.content_id: str`."""


class _QueryFields(NamedTuple):
    prompt: str
    target: str = ""
    images: tuple[Image, ...] = ()
    video: bool = False
    aliases: tuple[str, ...] = ()


class Query(_QueryFields):
    """A prompt, a target and images: the unit of editing, probing and training.

    Attributes:
        prompt: The question. `<image>` marks the place of an image.
        target: The answer. May be empty only if nothing is scored, as in generation.
        images: Images in the order in which the prompt refers to them. One image is taken as a
            tuple of one.
        video: Whether the images are the frames of one video.
        aliases: Other answers that count as right in free generation. They are not taught.
    """

    __slots__ = ()

    def __new__(
        cls,
        prompt: str,
        target: str = "",
        images: Image | Sequence[Image] = (),
        video: bool = False,
        aliases: str | Sequence[str] = (),
    ) -> Query:
        if isinstance(images, list | tuple) and not hasattr(images, "content_id"):
            images = tuple(images)
        else:
            images = (images,)
        aliases = (aliases,) if isinstance(aliases, str) else tuple(aliases)
        return super().__new__(cls, prompt, target, images, video, aliases)


class Case(NamedTuple):
    """One edit and the questions asked before and after it.

    Attributes:
        id: A unique name.
        edit: The query to teach.
        probes: Metric name to the questions it is computed from.
    """

    id: str
    edit: Query
    probes: Mapping[str, tuple[Query, ...]] = {}


class EncodedImage(NamedTuple):
    """The PNG file of an image that a delta holds.

    Attributes:
        data: The bytes of the file.
        content_id: sha256 of the bytes in hex.
    """

    data: bytes
    content_id: str


def encoded_image(data: bytes) -> EncodedImage:
    """Name the bytes of a PNG file by their content.

    Args:
        data: Bytes of a PNG file.

    Returns:
        The bytes with their SHA-256.
    """
    return EncodedImage(data, hashlib.sha256(data).hexdigest())
