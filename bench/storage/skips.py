"""The file that lists the cases a model cannot read."""

from __future__ import annotations

from pathlib import Path

import msgspec

__all__ = ["SKIPPED", "SkipRecord", "decode_skips", "read_skipped"]

SKIPPED = "skipped.json"


class SkipRecord(msgspec.Struct):
    """What a model cannot read.

    Attributes:
        key: Digest of the model and the cases.
        faults: The first fault of each case, by its id.
    """

    key: str
    faults: dict[str, str]


def decode_skips(data: bytes) -> dict[str, SkipRecord]:
    """Decode the file.

    Args:
        data: Its content, maybe empty.

    Returns:
        Records by label of the model; empty for a damaged file.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, SkipRecord]) if data else {}
    except msgspec.MsgspecError:
        return {}


def read_skipped(folder: Path) -> dict[str, dict[str, str]]:
    """The cases that were skipped in a run.

    Args:
        folder: The run folder.

    Returns:
        Faults by label of the model and id of the case.
    """
    path = folder / SKIPPED
    records = decode_skips(path.read_bytes() if path.is_file() else b"")
    return {model: record.faults for model, record in records.items() if record.faults}
