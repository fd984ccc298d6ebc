"""Safetensors headers of untrusted files, and canonical JSON; without torch.

A `.safetensors` file is 8 bytes N (little-endian), N bytes of JSON, then the data. Everything the
JSON claims is checked against the file before any data is read. Work and memory are bounded by the
size of the file, never by a claim in it.

References:
    https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from errata.functional.errors import DeltaFileError, InvalidInputError

__all__ = [
    "MAX_HEADER",
    "MAX_VALUES",
    "SIZES",
    "SafetensorsHeader",
    "TensorSlot",
    "build_header",
    "canonical_json",
    "open_regular_file",
    "parse_header",
    "parse_strict_json",
    "printable",
    "read_header",
]

MAX_HEADER = 8 << 20
"""Largest header that is read, in bytes; a delta with 30,000 edits has about this size."""

MAX_VALUES = 400_000
"""Most JSON values in a header: one byte of JSON can take a hundred bytes of memory."""

MAX_RANK = 16

SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of one element of each dtype."""


class TensorSlot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The location of one tensor.

    Attributes:
        dtype: Name of the dtype in safetensors.
        shape: Shape.
        data_offsets: Start and end of its bytes within the data.
    """

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def start(self) -> int:
        """Offset of the first byte within the data."""
        return self.data_offsets[0]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data_offsets[1] - self.data_offsets[0]


class SafetensorsHeader(NamedTuple):
    """A header that has been checked against its file.

    Attributes:
        metadata: The `__metadata__` of the file.
        tensors: Name -> location.
        data_start: Offset of the data in the file.
        num_bytes: Size of the whole file in bytes.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorSlot]
    data_start: int
    num_bytes: int


def canonical_json(value: Any) -> str:
    """Encode a value as canonical JSON: keys sorted by code point, no blanks, no escaped letters.

    Floats are Python's `repr`: the shortest digits that read back the same.

    Args:
        value: Dicts, lists, strings, numbers, booleans and None.

    Returns:
        The text.

    Raises:
        ValueError: If the value holds NaN or infinity.
        TypeError: If the value holds a type that JSON does not have.

    Example:
        >>> canonical_json({"b": 1, "a": [0.5, "é"]})
        '{"a":[0.5,"é"],"b":1}'
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:80]!r} is given twice")
    return unique


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def parse_strict_json(raw: bytes, what: str) -> Any:
    """Parse JSON without duplicate names, NaN, broken UTF-8, or more than `MAX_VALUES` values.

    Args:
        raw: The bytes.
        what: Their name in error messages.

    Returns:
        The value.

    Raises:
        ValueError: If the bytes break one of these rules.
    """
    count = raw.count(b",") + raw.count(b":") + raw.count(b"[") + 2 * raw.count(b"{")
    if count > MAX_VALUES:
        raise ValueError(f"{what} holds more than {MAX_VALUES} values")
    try:
        return json.loads(
            raw.decode(), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON as it must be: {printable(error)}") from None


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. Folders, pipes and devices are rejected before opening.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        InvalidInputError: If the file is not a regular file or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise InvalidInputError(f"{path} must be a file, and is {kind}.")
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInputError(f"{path} cannot be read: {reason}.") from None


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file, without its data.

    Args:
        path: The file.

    Returns:
        The header.

    Raises:
        InvalidInputError: If the file cannot be opened.
        DeltaFileError: If the header is invalid. Names the file and the violation.
    """
    with open_regular_file(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > num_bytes - 8:
            raise DeltaFileError(
                f"{path}: a safetensors file must hold its header, and {num_bytes} bytes do not "
                "hold "
                f"{'the 8 that give its length' if len(head) < 8 else f'{length} of header'}: "
                "the file is cut short or no safetensors file."
            )
        if length > MAX_HEADER:
            raise DeltaFileError(
                f"{path}: the header must have at most {MAX_HEADER} bytes, has {length}."
            )
        raw = file.read(length)
    try:
        return parse_header(raw, num_bytes)
    except ValueError as error:
        raise DeltaFileError(f"{path}: {error}.") from None


def parse_header(raw: bytes, num_bytes: int) -> SafetensorsHeader:
    """Check a header's JSON against the size of its file.

    Args:
        raw: The JSON, without the 8 bytes of its length.
        num_bytes: Size of the whole file in bytes.

    Returns:
        The header.

    Raises:
        ValueError: If the header is invalid or does not match the size.
    """
    body = parse_strict_json(raw, "the header")
    if not isinstance(body, dict):
        raise ValueError("the header must be a JSON object")
    try:
        metadata = msgspec.convert(body.pop("__metadata__", {}), dict[str, str])
        tensors = msgspec.convert(body, dict[str, TensorSlot])
    except msgspec.ValidationError as error:
        raise ValueError(
            f"the header does not have the form of safetensors: {printable(error)}"
        ) from None
    data_start = 8 + len(raw)
    end = 0
    for name, slot in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if slot.dtype not in SIZES:
            raise ValueError(f"tensor {name[:80]!r} has the unknown dtype {slot.dtype[:20]!r}")
        if len(slot.shape) > MAX_RANK or min(slot.shape, default=0) < 0:
            raise ValueError(f"tensor {name[:80]!r} has a shape that cannot be")
        start, stop = slot.data_offsets
        expected_bytes = math.prod(slot.shape) * SIZES[slot.dtype]
        if start != end or stop - start != expected_bytes:
            raise ValueError(
                f"tensor {name[:80]!r} must lie at byte {end} with {_bounded_int(expected_bytes)} "
                "bytes, "
                f"and the header says {_bounded_int(start)} to {_bounded_int(stop)}"
            )
        if (data_start + start) % SIZES[slot.dtype]:
            raise ValueError(f"tensor {name[:80]!r} must lie at a multiple of its element size")
        end = stop
    if data_start + end != num_bytes:
        raise ValueError(
            f"the header describes {_bounded_int(data_start + end)} bytes and the file has "
            f"{num_bytes}: "
            "it is cut short or has something appended"
        )
    return SafetensorsHeader(metadata, tensors, data_start, num_bytes)


def printable(text: object, max_length: int = 200) -> str:
    r"""Make text of an untrusted file safe for a message: printable, and not too long.

    Args:
        text: Any value.
        max_length: Characters to keep.

    Returns:
        The text.

    Example:
        >>> printable("a\x00b")
        'a\\x00b'
    """
    text = str(text)[:max_length]
    return text if text.isprintable() else ascii(text)[1:-1]


def _bounded_int(number: int) -> str:
    return str(number) if -(1 << 63) < number < 1 << 63 else "more than 2**63"


def build_header(
    metadata: dict[str, str], tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> tuple[bytes, list[str]]:
    """Build the first bytes of a safetensors file.

    Larger elements come first, then names in order; the JSON is padded with blanks to 8 bytes. The
    safetensors library writes the same, so both give the same file.

    Args:
        metadata: The `__metadata__` of the file.
        tensors: Name -> dtype and shape.

    Returns:
        The bytes up to the data, and the order in which the tensors follow.
    """
    order = sorted(tensors, key=lambda name: (-SIZES[tensors[name][0]], name.encode()))
    body: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        body[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, order
