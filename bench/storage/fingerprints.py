"""SHA-256 of files, computed once and cached by size, times and inode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from errata.functional.errors import InvalidInputError

__all__ = ["Fingerprints"]

_CHUNK_BYTES = 8 << 20


class _Entry(msgspec.Struct, frozen=True):
    state: tuple[int, int, int, int]  # size, mtime and ctime in ns, inode
    digest: str


class Fingerprints:
    """Digests of files. Reading 1 GB takes about a second, once per content.

    Args:
        cache: JSON of an earlier `to_json`; anything else is ignored.
    """

    def __init__(self, cache: bytes = b"") -> None:
        try:
            self._entries = msgspec.json.decode(cache, type=dict[str, _Entry]) if cache else {}
        except msgspec.MsgspecError:
            self._entries = {}

    def to_json(self) -> bytes:
        """The digests, for another process.

        Returns:
            JSON.
        """
        return msgspec.json.encode(self._entries, order="sorted") + b"\n"

    def of_file(self, path: Path) -> str:
        """Digest of a file's bytes.

        Args:
            path: The file.

        Returns:
            64 hexadecimal digits.

        Raises:
            InvalidInputError: If the file cannot be read.
        """
        name = str(path.resolve())
        try:
            found = path.stat()
            state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
            entry = self._entries.get(name)
            if entry is None or entry.state != state:
                with path.open("rb", buffering=0) as file:
                    digest = hashlib.sha256()
                    while chunk := file.read(_CHUNK_BYTES):
                        digest.update(chunk)
                entry = self._entries[name] = _Entry(state, digest.hexdigest())
        except OSError as error:
            raise InvalidInputError(
                f"{path} must be a file that can be read ({error.strerror}): check the path."
            ) from error
        return entry.digest

    def of_files(self, folder: Path, paths: Iterable[Path]) -> str:
        """Digest of several files and their names.

        Args:
            folder: Folder that the names are relative to.
            paths: Files in it.

        Returns:
            16 hexadecimal digits, or the empty string for no files.
        """
        lines = sorted(f"{path.relative_to(folder)}\t{self.of_file(path)}\n" for path in paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16] if lines else ""
