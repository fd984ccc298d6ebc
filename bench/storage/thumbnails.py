"""Small copies of images for the report."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from errata.functional.hashing import content_id

__all__ = ["image_file_name", "thumbnail"]


def image_file_name(image: Any) -> str:
    """A short name of an image's content, fit for a file.

    >>> class Dot:
    ...     content_id = "dot"
    >>> image_file_name(Dot())
    'e392dad8b08599f7'
    """
    return hashlib.sha256(content_id(image).encode()).hexdigest()[:16]


def thumbnail(image: Any, side: int = 224) -> bytes:
    """An image as PNG, made small: what the report shows.

    Raises InvalidInputError, see `image`.
    """
    from errata.adapters.inputs.images import open_image

    small = open_image(image).copy()
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "PNG")
    return data.getvalue()
