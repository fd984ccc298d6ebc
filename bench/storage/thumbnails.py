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

    Args:
        image: An image, as a query holds it.

    Returns:
        Sixteen hexadecimal digits.
    """
    return hashlib.sha256(content_id(image).encode()).hexdigest()[:16]


def thumbnail(image: Any, side: int = 224) -> bytes:
    """A small copy of an image, for the report.

    Args:
        image: An image, as a query holds it.
        side: Longer side in pixels, at most.

    Returns:
        A PNG file.

    Raises:
        InvalidInputError: If the image cannot be opened.
    """
    from errata.adapters.inputs.images import open_image

    small = open_image(image).copy()
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "PNG")
    return data.getvalue()
