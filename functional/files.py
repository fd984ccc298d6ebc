"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from errata.functional.errors import InvalidInputError

__all__ = ["atomic_folder", "atomic_write"]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a temporary file next to `path`, flush it to disk, then rename it to `path`.

    If the writing ends early (an error, a full disk, SIGKILL), the old file is unchanged.

    Args:
        path: The file. It is replaced if it exists.

    Yields:
        The open temporary file.

    Raises:
        InvalidInputError: If `path` is a folder or a device, or cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise InvalidInputError(
            f"{path} must be a file or not exist yet, and is a folder or a device: name a file."
        )
    temporary = target.parent / f".{target.name[:200]}.{secrets.token_hex(6)}.part"
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except (OSError, ValueError) as error:
        raise _write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _fsync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder next to `path`, flush it to disk, then rename it to `path`.

    Args:
        path: The folder. It must not exist, or be empty.

    Yields:
        The temporary folder.

    Raises:
        InvalidInputError: If `path` exists and is not an empty folder, or cannot be written.
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise InvalidInputError(
            f"{path} must not exist yet, and does: name a new folder or remove that one."
        )
    temporary = target.parent / f".{target.name[:200]}.{secrets.token_hex(6)}.part"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _fsync(file)
        _fsync(temporary)
        temporary.replace(target)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    """Call fsync on a file or folder; ignored if the system does not support it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_error(path: str | os.PathLike[str], error: Exception) -> InvalidInputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InvalidInputError(
        f"{path} could not be written ({reason}); nothing was changed: "
        "free space, or choose a place you may write to."
    )
