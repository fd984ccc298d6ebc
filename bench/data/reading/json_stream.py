"""A reader of JSON files in any outer shape, one record at a time, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata.functional.errors import InvalidInputError

__all__ = ["columns", "records"]

_CHUNK_CHARS = 1 << 20  # characters read at a time
_MAX_RECORD_CHARS = 1 << 24  # limit on one record, so that a broken file does not fill the memory
_WHITESPACE = " \t\r\n"


class _TextWindow:
    """A sliding window of decoded text over an open file, with a location for errors."""

    def __init__(self, file: Any, path: Path):
        self.file, self.path = file, path
        self.text, self.position, self.is_exhausted = "", 0, False
        self.first_line, self.num_records = 1, 0
        self.decoder = json.JSONDecoder(parse_constant=self._constant)

    def _constant(self, name: str) -> float:
        raise InvalidInputError(f"{self.location()}: numbers must be finite, got {name}.")

    def location(self, position: int | None = None) -> str:
        line = self.first_line + self.text.count(
            "\n", 0, self.position if position is None else position
        )
        return f"{self.path}, line {line}, record {self.num_records}"

    def read_more(self) -> bool:
        """Read more text and drop what was consumed. Returns False at the end of the file."""
        self.first_line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :], 0
        try:
            more = self.file.read(max(_CHUNK_CHARS, len(self.text)))
        except UnicodeDecodeError as fault:
            raise InvalidInputError(
                f"{self.path} must be UTF-8; byte {fault.object[fault.start]:#04x} is not "
                f"(after {self.num_records} records). Save the file as UTF-8."
            ) from fault
        self.is_exhausted = not more
        self.text += more
        return not self.is_exhausted

    def peek_char(self) -> str:
        """The next character that is not white space, '' at the end of the file."""
        while True:
            size = len(self.text)
            while self.position < size and self.text[self.position] in _WHITESPACE:
                self.position += 1
            if self.position < size:
                return self.text[self.position]
            if not self.read_more():
                return ""

    def read_object(self) -> Any:
        """Decode the object at the window's start. Reads more text while the object is cut off."""
        while True:
            try:
                value, self.position = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as fault:
                cut = fault.msg.startswith("Unterminated") or fault.pos > len(self.text) - 16
                if cut and len(self.text) - self.position <= _MAX_RECORD_CHARS and self.read_more():
                    continue
                raise InvalidInputError(
                    f"{self.location(fault.pos)}: not JSON ({fault.msg}). The file may be cut "
                    "short."
                ) from fault
            except RecursionError as fault:
                raise InvalidInputError(
                    f"{self.location()}: nested too deep to be a record."
                ) from fault
            self.num_records += 1
            return value


def records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Stream the objects of a JSON list or of JSON Lines, or the rows of a columnar object.

    A top-level list is never held in memory as a whole (MMEdit, VLKEB, MMKE-Bench, ADS-Edit, and
    ComprehendEdit on one line). A byte-order mark is ignored. A columnar object `{"questions":
    [...], "answers": [...]}` gives rows `{"questions": q, "answers": a}` in order.

    Args:
        path: The file.

    Yields:
        One record at a time, in the order of the file.

    Raises:
        InvalidInputError: If the file does not exist, is not UTF-8 or JSON, is cut short, or holds
            anything but objects. The message names the file, and the line and record if known.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInputError(f"{path} must be a JSON file; there is no such file.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        window = _TextWindow(file, path)
        start = window.peek_char()
        if start == "[":
            yield from _items(window)
        elif start == "{":
            yield from _objects(window)
        else:
            raise InvalidInputError(
                f"{path} must hold a JSON list or objects; it starts with {start!r}."
            )


def _items(window: _TextWindow) -> Iterator[dict[str, Any]]:
    window.position += 1
    if window.peek_char() == "]":
        return
    while True:
        if window.peek_char() != "{":
            raise InvalidInputError(
                f"{window.location()}: must be an object in braces, got {window.peek_char()!r}."
            )
        yield window.read_object()
        mark = window.peek_char()
        if mark not in (",", "]"):
            raise InvalidInputError(
                f"{window.location()}: a comma or the end of the list must follow; "
                f"got {mark or 'the end of the file'}. The file may be cut short."
            )
        window.position += 1
        if mark == "]":
            if window.peek_char():
                raise InvalidInputError(f"{window.location()}: text after the end of the list.")
            return


def _objects(window: _TextWindow) -> Iterator[dict[str, Any]]:
    first = window.read_object()
    if not window.peek_char():  # one object: a table by columns, or a file of one record
        yield from columns(first, window.path) if _is_columnar(first) else [first]
        return
    yield first
    while mark := window.peek_char():
        if mark != "{":
            raise InvalidInputError(
                f"{window.location()}: every line must be an object, got {mark!r}."
            )
        yield window.read_object()


def _is_columnar(table: dict[str, Any]) -> bool:
    return bool(table) and all(isinstance(column, list) for column in table.values())


def columns(table: dict[str, list[Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Stream the rows of a columnar object.

    Args:
        table: Column name to its values.
        path: The file, for errors.

    Yields:
        One row at a time: column name to value.

    Raises:
        InvalidInputError: If the columns differ in length.
    """
    sizes = {name: len(column) for name, column in table.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidInputError(f"{path}: columns must have one length, got {sizes}.")
    for row in zip(*table.values(), strict=True):
        yield dict(zip(table, row, strict=True))
