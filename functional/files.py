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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_folder", "atomic_write"]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a temporary file next to `path`, flush it to disk, then rename it to `path`.

    If the writing ends early (an error, a full disk, SIGKILL), the old file is unchanged. The next
    write of the same name removes the temporary file that SIGKILL leaves.

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
    temporary = target
    try:
        temporary, descriptor = _open_temporary(target)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(target)  # before the lock is gone
    except (OSError, ValueError) as error:
        raise _write_error(path, error) from error
    finally:
        if temporary is not target:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    _fsync(target.parent)


def _open_temporary(target: Path) -> tuple[Path, int]:
    """Open the temporary file of a target: always the same one, unless another process writes it.

    A file that a killed process left is written over, so none of them stays.
    """
    flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    if fcntl is not None:
        path = target.parent / f".{target.name[:200]}.part"
        for _ in range(8):
            descriptor = os.open(path, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # between opening and locking, its last owner may have renamed or removed it
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.ftruncate(descriptor, 0)
                    return path, descriptor
            except BlockingIOError:
                os.close(descriptor)
                break
            except OSError:
                pass
            os.close(descriptor)
    path = target.parent / f".{target.name[:200]}.{secrets.token_hex(6)}.part"
    return path, os.open(path, flags | os.O_EXCL, 0o666)


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
    lock = None
    try:
        _remove_stale_folders(target)
        temporary.mkdir(parents=True)
        lock = _lock_folder(temporary)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _fsync(file)
        _fsync(temporary)
        temporary.replace(target)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(target.parent)


def _lock_folder(path: Path) -> int | None:
    """Lock a temporary folder while it is filled. None where the system cannot, or another does."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale_folders(target: Path) -> None:
    """Remove temporary folders of this target that killed processes left."""
    prefix = f".{target.name[:200]}."
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            if path.name.startswith(prefix) and path.name.endswith(".part") and path.is_dir():
                lock = _lock_folder(path)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)


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
