"""Read what a delta file says of itself, without torch and without touching its tensors."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import msgspec

from .errors import DeltaFault, listed
from .header import FORMAT, Header, faults
from .safe import Slot, canonical, plain, read_table, strict_json

__all__ = ["KEY", "Peek", "decode", "misfits", "peek", "text_of"]

KEY = "errata"
"""The one metadata key of a delta file."""


class Peek(NamedTuple):
    """A delta file's header and the places of its tensors."""

    header: Header
    slots: dict[str, Slot]
    digest: str  # sha256 of the delta's content, as the file claims it
    data: int  # offset of the data in the file
    size: int  # of the whole file, in bytes


def peek(path: str | os.PathLike[str]) -> Peek:
    """Read and check the header of a delta file; its tensors' values are not read.

    Raises BadInput where the file can not be opened, DeltaFault naming the file and every fault.
    """
    table = read_table(path)
    if set(table.metadata) != {KEY}:
        found = ", ".join(sorted(repr(key[:40]) for key in table.metadata)[:4]) or "none"
        raise DeltaFault(
            f"{path}: a delta file must have the one metadata key {KEY!r}, has {found}; "
            "a PEFT adapter is read by `errata import`."
        )
    try:
        header, digest = decode(table.metadata[KEY])
    except ValueError as error:
        raise DeltaFault(f"{path}: {error}.") from None
    wrong = faults(header) or misfits(
        header, {name: (slot.dtype, slot.shape) for name, slot in table.slots.items()}
    )
    if wrong:
        raise DeltaFault(f"{path}: {listed(wrong)}.")
    return Peek(header, table.slots, digest, table.data, table.size)


def text_of(header: Header, digest: str) -> str:
    """The canonical JSON that a file holds under `KEY`. Raises ValueError for what JSON has not."""
    return canonical({**msgspec.to_builtins(header), "digest": digest})


def misfits(header: Header, have: dict[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """How tensors (name -> dtype, shape) differ from what a header says they are."""
    want = header.tensors()
    wrong = [f"tensor {name[:160]!r} is missing" for name in want if name not in have]
    wrong += [f"tensor {name[:160]!r} belongs to no entry" for name in have if name not in want]
    for name in want.keys() & have.keys():
        dtypes, shape = want[name]
        dtype, came = have[name]
        if came != shape:
            wrong.append(f"tensor {name!r} must have shape {list(shape)}, has {list(came)}")
        if dtype not in dtypes:
            wrong.append(f"tensor {name!r} must be one of {'/'.join(dtypes)}, is {dtype}")
    for entry in header.entries:
        kinds = {have[name][0] for name in entry.tensors() if name in have}
        if len(kinds & {"F64", "F32", "F16", "BF16"}) > 1:
            wrong.append(
                f"the tensors of {entry.name!r} must be of one dtype, are of {sorted(kinds)}"
            )
    return sorted(wrong)


def decode(text: str) -> tuple[Header, str]:
    """Header and digest from the canonical JSON; raises ValueError with the fault."""
    body: Any = strict_json(text.encode(), "the delta's description")
    if not isinstance(body, dict):
        raise ValueError("the delta's description must be a JSON object")
    if body.get("format") != FORMAT:
        raise ValueError(
            f"the delta is of format {plain(body.get('format'), 20)}, this version of errata reads "
            f"format {FORMAT}: update errata, or save the delta again with its own version"
        )
    if canonical(body) != text:
        raise ValueError("the delta's description is not canonical JSON (see FORMAT.md)")
    digest = body.pop("digest", "")
    if (
        not isinstance(digest, str)
        or len(digest) != 64
        or not set(digest) <= set("0123456789abcdef")
    ):
        raise ValueError("the delta's digest must be a sha256 in hex")
    try:
        header = msgspec.convert(body, Header)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"the delta's description does not fit: {plain(error)}") from None
    missing = set(Header.__struct_fields__) - set(body)
    if missing:
        raise ValueError(f"the delta's description lacks {', '.join(sorted(missing))}")
    return header, digest
