"""Records of a JSON file one by one, in bounded memory, whatever the file's outer shape is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata.functional.errors import BadInput

__all__ = ["columns", "records"]

_CHUNK = 1 << 20  # characters read at a time
_LONGEST = 1 << 24  # characters of one record; a broken file is not read into memory whole
_WHITE = " \t\r\n"


class _Window:
    """A sliding window of decoded text over an open file, with a place to name in errors."""

    def __init__(self, file: Any, path: Path):
        self.file, self.path = file, path
        self.text, self.at, self.ended = "", 0, False
        self.lines, self.count = 1, 0
        self.decoder = json.JSONDecoder(parse_constant=self._constant)

    def _constant(self, name: str) -> float:
        raise BadInput(f"{self.place()}: numbers must be finite, got {name}.")

    def place(self, at: int | None = None) -> str:
        line = self.lines + self.text.count("\n", 0, self.at if at is None else at)
        return f"{self.path}, line {line}, record {self.count}"

    def grow(self) -> bool:
        """Read on, dropping what was consumed; False at the end of the file."""
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        try:
            more = self.file.read(max(_CHUNK, len(self.text)))
        except UnicodeDecodeError as fault:
            raise BadInput(
                f"{self.path} must be UTF-8; byte {fault.object[fault.start]:#04x} is not "
                f"(after {self.count} records). Save the file as UTF-8."
            ) from fault
        self.ended = not more
        self.text += more
        return not self.ended

    def peek(self) -> str:
        """The next character that is not white space, '' at the end of the file."""
        while True:
            size = len(self.text)
            while self.at < size and self.text[self.at] in _WHITE:
                self.at += 1
            if self.at < size:
                return self.text[self.at]
            if not self.grow():
                return ""

    def value(self) -> Any:
        """Decode the object at the window's start; reads on while it is cut off."""
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as fault:
                cut = fault.msg.startswith("Unterminated") or fault.pos > len(self.text) - 16
                if cut and len(self.text) - self.at <= _LONGEST and self.grow():
                    continue
                raise BadInput(
                    f"{self.place(fault.pos)}: not JSON ({fault.msg}). The file may be cut short."
                ) from fault
            except RecursionError as fault:
                raise BadInput(f"{self.place()}: nested too deep to be a record.") from fault
            self.count += 1
            return value


def records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list, of JSON Lines, or the rows of a columnar object.

    A top-level list is never held whole (MMEdit, VLKEB, MMKE-Bench, ADS-Edit; ComprehendEdit on one
    line); a byte-order mark is tolerated. A columnar object `{"questions": [...], "answers":
    [...]}` gives rows `{"questions": q, "answers": a}` in order.

    Raises `BadInput`, naming file, line and record, for what is not JSON, not UTF-8, cut short, or
    holds something other than objects.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} must be a JSON file; there is no such file.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        window = _Window(file, path)
        start = window.peek()
        if start == "[":
            yield from _items(window)
        elif start == "{":
            yield from _objects(window)
        else:
            raise BadInput(f"{path} must hold a JSON list or objects; it starts with {start!r}.")


def _items(window: _Window) -> Iterator[dict[str, Any]]:
    window.at += 1
    if window.peek() == "]":
        return
    while True:
        if window.peek() != "{":
            raise BadInput(f"{window.place()}: must be an object in braces, got {window.peek()!r}.")
        yield window.value()
        mark = window.peek()
        if mark not in (",", "]"):
            raise BadInput(
                f"{window.place()}: a comma or the end of the list must follow; "
                f"got {mark or 'the end of the file'}. The file may be cut short."
            )
        window.at += 1
        if mark == "]":
            if window.peek():
                raise BadInput(f"{window.place()}: text after the end of the list.")
            return


def _objects(window: _Window) -> Iterator[dict[str, Any]]:
    first = window.value()
    if not window.peek():  # one object: a table by columns, or a file of one record
        yield from columns(first, window.path) if _columnar(first) else [first]
        return
    yield first
    while mark := window.peek():
        if mark != "{":
            raise BadInput(f"{window.place()}: every line must be an object, got {mark!r}.")
        yield window.value()


def _columnar(table: dict[str, Any]) -> bool:
    return bool(table) and all(isinstance(column, list) for column in table.values())


def columns(table: dict[str, list[Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a columnar object; raises `BadInput` when the columns differ in length."""
    sizes = {name: len(column) for name, column in table.items()}
    if len(set(sizes.values())) > 1:
        raise BadInput(f"{path}: columns must have one length, got {sizes}.")
    for row in zip(*table.values(), strict=True):
        yield dict(zip(table, row, strict=True))
