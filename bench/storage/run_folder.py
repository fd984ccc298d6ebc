"""The run folder: whose it is, which files in it belong to the run, and what each leg was made of.

A folder is a run's by `run.json`, which holds a digest of itself. `files.txt` lists the files that
the run has written, each before it is written. Only these are ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import msgspec

from errata.functional.errors import InvalidInputError, join_names
from errata.functional.files import atomic_write

__all__ = ["CHECKPOINT_FILE", "MANIFEST", "MARKER", "RunFolder"]

MARKER, MANIFEST = "run.json", "files.txt"
CHECKPOINT_FILE = ".state.safetensors"  # of a sequence in progress
_KIND, _FORMAT = "errata run", 2


class _Marker(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    kind: str
    format: int
    legs: dict[str, dict[str, str]] = {}  # what each leg's results depend on, by name of the leg
    digest: str = ""


class RunFolder:
    """A folder that holds one run.

    Args:
        path: The folder. It is created if it does not exist.
        overwrite: Whether to remove the files of the run that it holds, and no others.

    Raises:
        InvalidInputError: If it holds a `run.json` that this version of errata did not write.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._marker = _read_marker(path / MARKER)
        self._files = self._read_manifest() if self._marker else set()
        if self._marker and overwrite:
            self._remove()
        if self._marker is None:
            self._start()

    def _start(self) -> None:
        for name in (MARKER, MANIFEST):
            if (self.path / name).exists():
                raise _not_ours(self.path, [name])
        self._marker, self._files = _Marker(kind=_KIND, format=_FORMAT), set()
        self._write_marker()
        (self.path / MANIFEST).touch()

    def _remove(self) -> None:
        """Delete the files of the manifest, then the folders that this leaves empty."""
        root = self.path.resolve()
        for name in sorted(self._files):
            path = self.path / name
            if path.parent.resolve().is_relative_to(root):  # not through somebody's link
                path.unlink(missing_ok=True)
        folders = {parent for name in self._files for parent in PurePosixPath(name).parents}
        for folder in sorted(folders - {PurePosixPath()}, key=lambda f: -len(f.parts)):
            with contextlib.suppress(OSError):  # other files are in it
                (self.path / folder).rmdir()
        for name in (MANIFEST, MARKER):
            (self.path / name).unlink(missing_ok=True)
        self._marker, self._files = None, set()

    @property
    def legs(self) -> Mapping[str, Mapping[str, str]]:
        """What each leg's results depend on, by name of the leg."""
        assert self._marker is not None
        return self._marker.legs

    def set_leg(self, name: str, parts: Mapping[str, str]) -> None:
        """Record what a leg's results depend on.

        Args:
            name: Name of the leg.
            parts: Values or digests by name.
        """
        assert self._marker is not None
        if self._marker.legs.get(name) != dict(parts):
            self._marker.legs[name] = dict(parts)
            self._write_marker()

    def claim(self, *names: str) -> list[Path]:
        """Take files as the run's own, before they are written.

        Args:
            *names: Paths relative to the folder, with slashes.

        Returns:
            Their paths.

        Raises:
            InvalidInputError: If one exists and is not the run's.
        """
        new = [name for name in names if name not in self._files]
        foreign = [name for name in new if (self.path / name).exists()]
        if foreign:
            raise _not_ours(self.path, foreign)
        if new:
            with (self.path / MANIFEST).open("ab", buffering=0) as file:
                file.write("".join(f"{name}\n" for name in new).encode())
                os.fsync(file.fileno())
            self._files.update(new)
        return [self.path / name for name in names]

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run, completely or not at all.

        Args:
            name: Path relative to the folder.
            data: Its content.
        """
        (path,) = self.claim(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)

    def read(self, name: str) -> bytes:
        """Read a file of the run.

        Args:
            name: Path relative to the folder.

        Returns:
            Its content; empty if it is not there or not the run's.
        """
        path = self.path / name
        return path.read_bytes() if name in self._files and path.is_file() else b""

    def _read_manifest(self) -> set[str]:
        path = self.path / MANIFEST
        if not path.is_file():
            return set()
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
        return {name for name in lines if _is_inside(name)}

    def _write_marker(self) -> None:
        assert self._marker is not None
        with atomic_write(self.path / MARKER) as file:
            file.write(_sealed(self._marker))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and not {"..", "."} & set(path.parts)


def _sealed(marker: _Marker) -> bytes:
    bare = msgspec.structs.replace(marker, digest="")
    digest = hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()
    sealed = msgspec.structs.replace(marker, digest=digest)
    return msgspec.json.format(msgspec.json.encode(sealed, order="sorted"), indent=1) + b"\n"


def _read_marker(path: Path) -> _Marker | None:
    """The marker of a run; None if there is none.

    Raises InvalidInputError for a file that is not a marker as it was written.
    """
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        marker = msgspec.json.decode(data, type=_Marker)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _not_ours(path.parent, [MARKER]) from None
    if marker.kind != _KIND or marker.format != _FORMAT or _sealed(marker) != data:
        raise _not_ours(path.parent, [MARKER])
    return marker


def _not_ours(folder: Path, names: Iterable[str]) -> InvalidInputError:
    return InvalidInputError(
        f"{folder} holds {join_names(names)}, which this version of errata did not write as it is: "
        "give another `output_dir`, or move it away."
    )
