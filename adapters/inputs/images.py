"""Images from anything a query may hold: opened safely, turned to RGB, named by content.

An image is a PIL image, a path, or a lazy object with `.load() -> PIL.Image` and `.content_id:
str`. Decoding follows Hugging Face's `load_image`: the camera's orientation is applied, then the
image is converted to RGB.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from errata.functional import hashing
from errata.functional.errors import InvalidInputError
from errata.functional.queries import EncodedImage, Image

__all__ = ["ALLOWED_FORMATS", "content_id", "open_image"]

ALLOWED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is opened. Pillow knows more; some of those run other programs."""


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns on the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def _open_file(path: str | os.PathLike[str]) -> PILImage.Image:
    name = os.fspath(path)
    try:
        with PILImage.open(path, formats=ALLOWED_FORMATS) as file:
            limit = PILImage.MAX_IMAGE_PIXELS or 2**63
            if file.width * file.height > limit:
                raise InvalidInputError(
                    f"image {name!r} must have at most {limit:,} pixels, and claims "
                    f"{file.width} x {file.height}: shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS "
                    "if you trust the file."
                )
            return _to_rgb(file)
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"image {name!r} must exist: check the path or the image root."
        ) from error
    except IsADirectoryError as error:
        raise InvalidInputError(f"image {name!r} must be a file, and is a folder.") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise InvalidInputError(
            f"image {name!r} must have at most {PILImage.MAX_IMAGE_PIXELS:,} pixels: {error}"
        ) from error
    except UnidentifiedImageError as error:
        raise InvalidInputError(
            f"image {name!r} must be an image ({', '.join(ALLOWED_FORMATS)}), and its content is "
            "none: "
            "convert it or take it out."
        ) from error
    except PermissionError as error:
        raise InvalidInputError(
            f"image {name!r} must be open to you, and is not ({error.strerror}): change its "
            "permissions."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InvalidInputError(
            f"image {name!r} must be a whole image, and cannot be decoded ({error}): "
            "fetch the file again."
        ) from error


def open_image(image: Image) -> PILImage.Image:
    """Open an image, upright and in RGB.

    Args:
        image: A PIL image, a path, encoded bytes, or an object with `.load()` and `.content_id`.

    Returns:
        The image.

    Raises:
        InvalidInputError: Names the file: missing, truncated, no image, or too large to be safe.
    """
    if isinstance(image, PILImage.Image):
        return _to_rgb(image)
    if isinstance(image, (str, os.PathLike)):
        return _open_file(image)
    if isinstance(image, EncodedImage):
        return _decode_png(image.data)
    if hasattr(image, "load") and hasattr(image, "content_id"):
        loaded = image.load()
        if isinstance(loaded, PILImage.Image):
            return _to_rgb(loaded)
        raise InvalidInputError(
            f"image {image.content_id!r} must load as a PIL image, and gave a "
            f"{type(loaded).__name__}."
        )
    raise InvalidInputError(
        "an image must be a PIL image, a path, or an object with .load() and .content_id; "
        f"got a {type(image).__name__}."
    )


@functools.lru_cache(maxsize=65536)
def _digest(path: str, changed: int, size: int) -> str:
    del changed, size  # they are there so that a file that changed is read again
    return hashing.content_id(path)


def content_id(image: Image) -> str:
    """Name an image by its content: SHA-256 of a file's bytes, or of a PIL image's pixels and size.

    A lazy image brings its own.

    >>> from PIL import Image
    >>> content_id(Image.new("RGB", (2, 2))) == content_id(Image.new("RGB", (2, 2)))
    True

    Args:
        image: As `open_image` takes it.

    Returns:
        The content id.

    Raises:
        InvalidInputError: For a file that cannot be read.
    """
    if isinstance(image, PILImage.Image):
        return hashing.content_id(image)
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        try:
            state = path.stat()
            return _digest(str(path), state.st_mtime_ns, state.st_size)
        except OSError as error:
            raise InvalidInputError(
                f"image {os.fspath(image)!r} must be a file that can be read ({error.strerror}): "
                "check the path or the image root."
            ) from error
    name = getattr(image, "content_id", None)
    if not isinstance(name, str) or not name:
        raise InvalidInputError(
            "an image must be a PIL image, a path, or an object with .load() and .content_id: str; "
            f"got a {type(image).__name__}."
        )
    return name


def encode_png(image: Image) -> bytes:
    """Encode an image as PNG, the form in which delta files hold images.

    Args:
        image: As `open_image` takes it.

    Returns:
        The bytes of a PNG file.
    """
    data = io.BytesIO()
    open_image(image).save(data, "PNG")
    return data.getvalue()


def _decode_png(data: bytes) -> PILImage.Image:
    try:
        with PILImage.open(io.BytesIO(data), formats=("PNG",)) as file:
            return _to_rgb(file)
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        PILImage.DecompressionBombError,
        PILImage.DecompressionBombWarning,
    ) as error:
        raise InvalidInputError(
            f"an image in a delta must be a PNG file, and is none: {error}"
        ) from error
