"""Images from anything a query may hold: opened safely, turned to RGB, named by content.

An image is a PIL image, a path, or a lazy object with `.load() -> PIL.Image` and `.content_id:
str`. Decoding follows Hugging Face's `load_image`: the camera's orientation is applied, then the
image is converted to RGB.

Every image comes through here, a benchmark's too. Refused are files that are missing, truncated, no
image, of another format than `ALLOWED_FORMATS` or above Pillow's pixel limit, pipes and devices,
images without pixels, and modes or values without a meaning. Images of 16 bits are scaled.
"""

from __future__ import annotations

import functools
import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from errata.functional import hashing
from errata.functional.errors import InvalidInputError
from errata.functional.queries import EncodedImage, Image

__all__ = ["ALLOWED_FORMATS", "content_id", "open_image"]

ALLOWED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is opened. Pillow knows more; some of those run other programs."""


_PLAIN_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_PLAIN_MODES |= {"HSV"}
"""Modes of 8 bits per channel, which Pillow converts without loss of range."""


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Upright and in RGB. Greys of other ranges are scaled to 0..255:

    16-bit modes and integers above 255 by 1/257, floats of at most 1 by 255; integers and floats
    of 0 to 255 are taken as they are. Other ranges have no meaning here.
    """
    if 0 in image.size:
        raise InvalidInputError(
            f"an image must have pixels, and is {image.size[0]} x {image.size[1]}."
        )
    image.load()  # a truncated or closed image says so here
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled_grey(image)
    if image.mode not in _PLAIN_MODES:
        raise InvalidInputError(
            f"an image must be grey, RGB, CMYK, YCbCr or HSV, and its mode is {image.mode!r}: "
            "convert it to RGB."
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns on the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled_grey(image: PILImage.Image) -> PILImage.Image:
    with np.errstate(invalid="ignore"):  # signalling NaNs; all NaNs are refused below
        values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and high > 255)
    top = 65_535.0 if is_16_bit else 1.0 if image.mode == "F" and high <= 1 else 255.0
    if not (low >= 0 and high <= top):  # NaN too
        raise InvalidInputError(
            f"an image of mode {image.mode!r} must have values from 0 to 255, of 16 bits, or "
            f"floats from 0 to 1; its are from {low:g} to {high:g}: scale it to 8 bits."
        )
    return PILImage.fromarray(np.rint(values * (255 / top)).astype(np.uint8), "L")


def _open_file(path: str | os.PathLike[str]) -> PILImage.Image:
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise InvalidInputError(f"image {name!r} must be a file, and is a pipe or a device.")
        with PILImage.open(path, formats=ALLOWED_FORMATS) as file:
            _refuse_large(file, f"image {name!r}")
            try:
                return _to_rgb(file)
            except InvalidInputError as error:
                raise InvalidInputError(f"image {name!r}: {error}") from error
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


def _refuse_large(file: PILImage.Image, name: str) -> None:
    limit = PILImage.MAX_IMAGE_PIXELS or 2**63
    if file.width * file.height > limit:
        raise InvalidInputError(
            f"{name} must have at most {limit:,} pixels, and claims {file.width} x {file.height}: "
            "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
        )


def _convert(image: PILImage.Image, name: str) -> PILImage.Image:
    try:
        return _to_rgb(image)
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, AttributeError) as error:
        raise InvalidInputError(
            f"{name} must be a whole image that is open, and cannot be decoded ({error}): open it "
            "again, or pass its path."
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
        return _convert(image, f"a {image.size[0]} x {image.size[1]} image in memory")
    if isinstance(image, (str, os.PathLike)):
        return _open_file(image)
    if isinstance(image, EncodedImage):
        return _decode_png(image.data)
    if hasattr(image, "load") and hasattr(image, "content_id"):
        loaded = image.load()
        if isinstance(loaded, PILImage.Image):
            return _convert(loaded, f"image {image.content_id!r}")
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
        if 0 in image.size:
            raise InvalidInputError(
                f"an image must have pixels, and is {image.size[0]} x {image.size[1]}."
            )
        try:
            return hashing.content_id(image)
        except (OSError, SyntaxError, ValueError, EOFError, AttributeError) as error:
            raise InvalidInputError(
                f"a {image.size[0]} x {image.size[1]} image in memory must be whole and open, and "
                f"cannot be decoded ({error}): open it again, or pass its path."
            ) from error
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        try:
            state = path.stat()
            if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
                raise InvalidInputError(
                    f"image {os.fspath(image)!r} must be a file, and is a pipe or a device."
                )
            return _digest(str(path), state.st_mtime_ns, state.st_size)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise InvalidInputError(
                f"image {os.fspath(image)!r} must be a file that can be read ({reason}): "
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
            _refuse_large(file, "an image in a delta")
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
