"""Images of a benchmark: found under a root, decoded on demand, or replaced by drawn stand-ins.

Annotations are read without torch, so what opens images is imported where it is used.
"""

from __future__ import annotations

import hashlib
import os
import random
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import msgspec
from PIL import Image, ImageDraw

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
"""What to do if an image is missing: raise an error, skip the record, evaluate the question
without an image, or draw a stand-in from the image's name."""

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_IMAGE_FOLDER_NAMES = ("", "images", "VLKEB_images", "mmkb_images", "data_image", "ADS-Edit")


class MissingImageError(InvalidInputError):
    """An image that a record names is under none of the roots."""


class ImageFile:
    """An image file that is decoded when it is used.

    Args:
        path: The file. It is not opened yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"ImageFile({str(self.path)!r})"

    @cached_property
    def content_id(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal."""
        from errata.functional.hashing import content_id

        return content_id(self.path)

    def load(self) -> Image.Image:
        """Decode the image to RGB, by the rules of `adapters/inputs/images.py`.

        Returns:
            The image.

        Raises:
            InvalidInputError: If the file is not an image, is truncated, has values without a
                meaning, or too many pixels. The header is checked before decoding.
            MissingImageError: If the file does not exist.
        """
        from errata.adapters.inputs.images import open_image

        if not self.path.exists():
            raise MissingImageError(f"{self.path} does not exist.")
        return open_image(self.path)


class PlaceholderImage:
    """A stand-in for a missing image, drawn deterministically from its name.

    Different names give different colors and shapes, so that edits on them can be told apart.
    Scores on stand-ins are not scores on the benchmark.

    Args:
        name: The name of the missing image.
        size: Width and height in pixels.
    """

    def __init__(self, name: str, size: int = 224):
        self.name, self.size = name, size

    def __repr__(self) -> str:
        return f"PlaceholderImage({self.name!r})"

    @property
    def content_id(self) -> str:
        """SHA-256 of name and size, in hexadecimal."""
        return hashlib.sha256(f"drawn:{self.size}:{self.name}".encode()).hexdigest()

    def load(self) -> Image.Image:
        """Draw the stand-in.

        Returns:
            An RGB image [size size].
        """
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
    """Normalize an image name to a relative path below its root.

    Args:
        name: The name in the file.
        allow_parent_paths: Drop leading `../`, as in ADS-Edit's `../nuscenes/...`.

    Returns:
        The path, with `/` as separator.

    Raises:
        InvalidInputError: If the name is absolute, leaves its root or is empty.

    Example:
        >>> safe_name("m.0104lr/google_15.jpg")
        'm.0104lr/google_15.jpg'
        >>> safe_name("../nuscenes/a b.jpg", allow_parent_paths=True)
        'nuscenes/a b.jpg'
    """
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
    """List the files of a folder. Empty if the folder does not exist."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


class ImageFolder(msgspec.Struct, frozen=True):
    """Where a benchmark's images are, and what to do if one is missing.

    Attributes:
        roots: The folders to search, in order.
        missing_images: What `find` does if there is no such file.
        allow_parent_paths: Whether leading `../` is dropped from names.
    """

    roots: tuple[Path, ...]
    missing_images: OnMissing = "error"
    allow_parent_paths: bool = False

    @classmethod
    def around(
        cls, file: Path, root: str, missing_images: OnMissing, allow_parent_paths: bool = False
    ) -> ImageFolder:
        """Choose the roots to search for an annotation file's images.

        Args:
            file: The annotation file.
            root: The image root. Empty: the file's folder and the two folders above it.
            missing_images: What to do if an image is missing.
            allow_parent_paths: Whether leading `../` is dropped from names.

        Returns:
            The bases and their subfolders with the usual names, those that exist.

        Raises:
            InvalidInputError: If `root` is not a folder.
        """
        bases = [Path(root)] if root else [file.parent, *list(file.parents)[1:3]]
        if root and not bases[0].is_dir():
            raise InvalidInputError(f"the image root {root} must be a folder; there is none.")
        _list_files.cache_clear()  # files may have been added since the last call
        found = (base / alias for base in bases for alias in _IMAGE_FOLDER_NAMES)
        return cls(
            tuple(dict.fromkeys(one for one in found if one.is_dir())),
            missing_images,
            allow_parent_paths,
        )

    def path(self, name: str) -> Path | None:
        """Find the file of an image name. A name in .json means the image of the same stem.

        Each folder is listed only once, since benchmarks name tens of thousands of images in a few.

        Args:
            name: The name in the annotation file.

        Returns:
            The path, or None if there is no such file.

        Raises:
            InvalidInputError: If the name is not a relative path below its root.
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
        """Find the image of a name.

        Args:
            name: The name in the annotation file.

        Returns:
            The file, or what `missing_images` says: a stand-in for "placeholder", None for "none".

        Raises:
            InvalidInputError: If the name is not a relative path below its root.
            MissingImageError: If the image is missing and `missing_images` is "error" or "skip".
        """
        if path := self.path(name):
            return ImageFile(path)
        if self.missing_images == "placeholder":
            return PlaceholderImage(name)
        if self.missing_images == "none":
            return None
        roots = ", ".join(map(str, self.roots)) or "no folder"
        raise MissingImageError(f"image {name!r} is in none of: {roots}. Give the image root.")
