"""Images of a benchmark: found under a root, opened late and with care, or drawn as stand-ins."""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import msgspec
from PIL import Image, ImageDraw, UnidentifiedImageError

from errata.functional.errors import InvalidInputError

__all__ = [
    "ImageFile",
    "ImageFolder",
    "MissingImageError",
    "OnMissing",
    "PlaceholderImage",
    "safe_name",
]

OnMissing = Literal["error", "skip", "none", "placeholder"]
"""What a missing image does: an error, the record skipped, the question asked without an image, or
a stand-in drawn from the image's name."""

_MAX_PIXELS = 64_000_000  # of one picture: 192 MB decoded; COCO's have 0.3 million
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_IMAGE_FOLDER_NAMES = ("", "images", "VLKEB_images", "mmkb_images", "data_image", "ADS-Edit")


class MissingImageError(InvalidInputError):
    """An image a record names is under none of the roots."""


class ImageFile:
    """An image file: `load()` opens it as RGB, `key` is the hash of its bytes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"ImageFile({str(self.path)!r})"

    @cached_property
    def content_id(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load(self) -> Image.Image:
        """Decode to RGB. Raises `InvalidInputError` for what is no image, truncated, or a
        decompression bomb (more than 64 million pixels, judged by the header before anything is
        decoded)."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(self.path) as picture:
                    width, height = picture.size
                    if width * height > _MAX_PIXELS:
                        raise InvalidInputError(
                            f"{self.path} must have at most {_MAX_PIXELS:,} pixels; "
                            f"it is {width} x {height}."
                        )
                    return picture.convert("RGB")
        except Image.DecompressionBombError as fault:
            raise InvalidInputError(
                f"{self.path} must have at most {_MAX_PIXELS:,} pixels: {fault}."
            ) from fault
        except FileNotFoundError as fault:
            raise MissingImageError(f"{self.path} does not exist.") from fault
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as fault:
            raise InvalidInputError(
                f"{self.path} must be an image; it cannot be read: {fault}."
            ) from fault


class PlaceholderImage:
    """A stand-in for an image that is not there: drawn from its name, the same every time.

    Different names give different colours and shapes, so that edits on them can be told apart; the
    numbers they give say nothing about the real benchmark.
    """

    def __init__(self, name: str, size: int = 224):
        self.name, self.size = name, size

    def __repr__(self) -> str:
        return f"PlaceholderImage({self.name!r})"

    @property
    def content_id(self) -> str:
        return hashlib.sha256(f"drawn:{self.size}:{self.name}".encode()).hexdigest()

    def load(self) -> Image.Image:
        draw = random.Random(self.name)

        def color() -> tuple[int, int, int]:
            return draw.randrange(256), draw.randrange(256), draw.randrange(256)

        picture = Image.new("RGB", (self.size, self.size), color())
        pen = ImageDraw.Draw(picture)
        for _ in range(6):
            x, y = draw.randrange(self.size), draw.randrange(self.size)
            reach = draw.randrange(self.size // 10, self.size // 3)
            box = (x - reach, y - reach, x + reach, y + reach)
            (pen.ellipse if draw.random() < 0.5 else pen.rectangle)(box, fill=color())
        return picture


def safe_name(name: str, allow_parent_paths: bool = False) -> str:
    """An image name as a relative path that stays below its root.

    `allow_parent_paths=True` drops leading `../` (ADS-Edit names its nuScenes frames
    `../nuscenes/...`).

    >>> safe_name("m.0104lr/google_15.jpg"), safe_name("../nuscenes/a b.jpg", allow_parent_paths=True)
    ('m.0104lr/google_15.jpg', 'nuscenes/a b.jpg')

    Raises `InvalidInputError` for absolute names, names that climb out of the root, and empty ones.
    """  # noqa: E501
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    while allow_parent_paths and parts and parts[0] == "..":
        parts.pop(0)
    climbs = ".." in parts or name.startswith(("/", "\\", "~")) or ":" in name[:3]
    if climbs or not parts or "\0" in name:
        raise InvalidInputError(
            f"an image name must be a relative path below the image root; got {name[:200]!r}."
        )
    return "/".join(parts)


@lru_cache(maxsize=4096)
def _list_files(folder: str) -> frozenset[str]:
    """The files of a folder; none of a folder that is not there."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


class ImageFolder(msgspec.Struct, frozen=True):
    """Where a benchmark's images lie, and what to do about those that do not."""

    roots: tuple[Path, ...]
    missing_images: OnMissing = "error"
    allow_parent_paths: bool = False

    @classmethod
    def around(
        cls, file: Path, root: str, missing_images: OnMissing, allow_parent_paths: bool = False
    ) -> ImageFolder:
        """The roots to search for a file's images: the one given, or what lies around it."""
        bases = [Path(root)] if root else [file.parent, *list(file.parents)[1:3]]
        if root and not bases[0].is_dir():
            raise InvalidInputError(f"the image root {root} must be a folder; there is none.")
        _list_files.cache_clear()  # files may have come since the last reading
        found = (base / alias for base in bases for alias in _IMAGE_FOLDER_NAMES)
        return cls(
            tuple(dict.fromkeys(one for one in found if one.is_dir())),
            missing_images,
            allow_parent_paths,
        )

    def path(self, name: str) -> Path | None:
        """The file a name stands for; the picture of the same stem where it ends in .json.

        Folders are listed once: a benchmark names ten thousands of images in a few of them.
        """
        folder, _, file = safe_name(name, self.allow_parent_paths).rpartition("/")
        stem = file.removesuffix(".json")
        files = [file] if stem == file else [stem + suffix for suffix in _IMAGE_SUFFIXES]
        for root in self.roots:
            there = _list_files(os.path.join(root, folder))
            for one in files:
                if one in there:
                    return Path(root, folder, one)
        return None

    def find(self, name: str) -> ImageFile | PlaceholderImage | None:
        """The image of that name; None asks the question without one. Raises `Missing`."""
        if path := self.path(name):
            return ImageFile(path)
        if self.missing_images == "placeholder":
            return PlaceholderImage(name)
        if self.missing_images == "none":
            return None
        roots = ", ".join(map(str, self.roots)) or "no folder"
        raise MissingImageError(f"image {name!r} is in none of: {roots}. Give the image root.")
