"""Read the description of a delta file, without torch and without reading its tensors."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import msgspec

from errata.functional.deltas.format1 import StoredNames, convert_description, rename_tensors
from errata.functional.deltas.safetensors_header import (
    TensorSlot,
    canonical_json,
    parse_strict_json,
    printable,
    read_header,
)
from errata.functional.errors import DeltaFileError, join_messages
from errata.functional.header import FORMAT, Header, validate_header
from errata.functional.kinds.schema import convert_header

__all__ = [
    "METADATA_KEY",
    "DecodedHeader",
    "DeltaInfo",
    "decode_header",
    "encode_header",
    "inspect_delta",
    "tensor_mismatches",
]

METADATA_KEY = "errata"
"""The one metadata key of a delta file."""


class DeltaInfo(NamedTuple):
    """The header of a delta file and the location of its tensors.

    Attributes:
        header: The header.
        tensors: Name -> dtype, shape and offsets.
        digest: sha256 of the delta's content in hex, as the file claims it.
        data_start: Offset of the data in the file.
        num_bytes: Size of the whole file in bytes.
        stored: The names in a file of format 1; None for a file of the current format.
    """

    header: Header
    tensors: dict[str, TensorSlot]
    digest: str
    data_start: int
    num_bytes: int
    stored: StoredNames | None = None


class DecodedHeader(NamedTuple):
    """A parsed description of a delta.

    Attributes:
        header: The header.
        digest: sha256 in hex, as the description claims it.
        stored: The names in a file of format 1; None for the current format.
    """

    header: Header
    digest: str
    stored: StoredNames | None


def inspect_delta(path: str | os.PathLike[str]) -> DeltaInfo:
    """Read and check the header of a delta file, without the values of its tensors.

    Args:
        path: The file, of format 2 or 1.

    Returns:
        The header and the location of the tensors.

    Raises:
        InvalidInputError: If the file cannot be opened.
        DeltaFileError: If the file breaks the format. Names the file and the violations.
    """
    file_header = read_header(path)
    if set(file_header.metadata) != {METADATA_KEY}:
        names = ", ".join(sorted(repr(key[:40]) for key in file_header.metadata)[:4]) or "none"
        raise DeltaFileError(
            f"{path}: a delta file must have the one metadata key {METADATA_KEY!r}, has {names}; "
            "a PEFT adapter is read by `errata import`."
        )
    try:
        header, digest, stored = decode_header(file_header.metadata[METADATA_KEY])
    except ValueError as error:
        raise DeltaFileError(f"{path}: {error}.") from None
    tensors = file_header.tensors
    if stored is not None:
        renamed = {old: new for new, old in stored.tensors.items()}
        tensors = {renamed.get(name, name): slot for name, slot in tensors.items()}
    problems = validate_header(header) or tensor_mismatches(
        header, {name: (slot.dtype, slot.shape) for name, slot in tensors.items()}
    )
    if problems:
        raise DeltaFileError(f"{path}: {join_messages(problems)}.")
    return DeltaInfo(header, tensors, digest, file_header.data_start, file_header.num_bytes, stored)


OPTIONAL_KEYS = frozenset({"shared_edits", "replaced_edits", "shared_slots", "shared_ranks"})
"""Left out of a description where they are empty."""


def encode_header(header: Header, digest: str) -> str:
    """Encode a header as the canonical JSON that a file has under `METADATA_KEY`.

    Args:
        header: The header.
        digest: sha256 in hex, or "" for the text that is hashed.

    Returns:
        The text.

    Raises:
        ValueError: If the settings hold NaN or infinity.
        TypeError: If the settings hold a value that JSON does not have.
    """
    description = msgspec.to_builtins(header)
    for part in (description, *description["entries"]):
        for name in OPTIONAL_KEYS & part.keys():
            if not part[name]:
                del part[name]
    return canonical_json({**description, "digest": digest})


def tensor_mismatches(header: Header, stored: dict[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Compare stored tensors with the specification in a header.

    Args:
        header: The header.
        stored: Name -> dtype and shape.

    Returns:
        One phrase per violation, sorted; empty if all fit.
    """
    specs = header.tensor_specs()
    mismatches = [f"tensor {name[:160]!r} is missing" for name in specs if name not in stored]
    mismatches += [
        f"tensor {name[:160]!r} belongs to no entry" for name in stored if name not in specs
    ]
    for name in specs.keys() & stored.keys():
        dtypes, shape = specs[name]
        dtype, stored_shape = stored[name]
        if stored_shape != shape:
            mismatches.append(
                f"tensor {name!r} must have shape {list(shape)}, has {list(stored_shape)}"
            )
        if dtype not in dtypes:
            mismatches.append(f"tensor {name!r} must be one of {'/'.join(dtypes)}, is {dtype}")
    for entry in header.entries:
        kinds = {stored[name][0] for name in entry.tensor_specs() if name in stored}
        if len(kinds & {"F64", "F32", "F16", "BF16"}) > 1:
            mismatches.append(
                f"the tensors of {entry.name!r} must be of one dtype, are of {sorted(kinds)}"
            )
    return sorted(mismatches)


def decode_header(text: str) -> DecodedHeader:
    """Decode the canonical JSON of a description, of format 2 or 1.

    Args:
        text: What a file holds under `METADATA_KEY`.

    Returns:
        The header, the claimed digest, and the stored names if the text is of format 1.

    Raises:
        ValueError: If the text breaks a rule of `FORMAT.md`.
    """
    body: Any = parse_strict_json(text.encode(), "the delta's description")
    if not isinstance(body, dict):
        raise ValueError("the delta's description must be a JSON object")
    number = body.get("format")
    if type(number) is not int or number not in (1, FORMAT):
        raise ValueError(
            f"the delta is of format {printable(number, 20)}, this version of errata reads formats "
            f"1 and {FORMAT}: update errata, or save the delta again with its own version"
        )
    if canonical_json(body) != text:
        raise ValueError("the delta's description is not canonical JSON (see FORMAT.md)")
    digest = body.pop("digest", "")
    if (
        not isinstance(digest, str)
        or len(digest) != 64
        or not set(digest) <= set("0123456789abcdef")
    ):
        raise ValueError("the delta's digest must be a sha256 in hex")
    stored = None
    if number == 1:
        stored = StoredNames(canonical_json({**body, "digest": ""}), rename_tensors(body))
        body = convert_description(body)
    try:
        header = convert_header(body)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"the delta's description does not fit: {printable(error)}") from None
    entries = [entry for entry in body.get("entries", ()) if isinstance(entry, dict)]
    if any(not part[n] for part in (body, *entries) for n in OPTIONAL_KEYS & part.keys()):
        raise ValueError(f"{', '.join(sorted(OPTIONAL_KEYS))} must be left out where empty")
    missing = set(Header.__struct_fields__) - OPTIONAL_KEYS - set(body)
    if missing:
        raise ValueError(f"the delta's description lacks {', '.join(sorted(missing))}")
    return DecodedHeader(header, digest, stored)
