"""The lines of a run's progress file: which units have rows, where, and at what cost."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, NamedTuple

import msgspec
from msgspec import Meta

__all__ = [
    "PROGRESS",
    "RESULTS",
    "DamagedLogWarning",
    "LegKey",
    "Log",
    "UnitRecord",
    "UnitState",
    "VoidRecord",
    "read_log",
    "read_units",
    "without_units",
]

RESULTS, PROGRESS = "results.jsonl", "progress.jsonl"


class LegKey(msgspec.Struct, frozen=True, kw_only=True):
    """A model, an editor and a protocol, by their names in the settings."""

    model: str
    editor: str
    protocol: str

    def __str__(self) -> str:
        return f"{self.model}/{self.editor}/{self.protocol}"


class UnitState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A unit of a leg: a case of `single`, a step of a sequence.

    Attributes:
        number: Its number in the leg.
        key: Digest of the records it depends on.
        images: Digest of the contents of their images.
    """

    number: Annotated[int, Meta(ge=0, lt=1 << 53)]
    key: str = ""
    images: str = ""


Natural = Annotated[int, Meta(ge=0, lt=1 << 62)]
Seconds = Annotated[float, Meta(ge=0)]


class UnitRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="unit"):
    """One append: the rows in bytes `start_byte` to `end_byte` of the results, and their cost."""

    leg: LegKey
    units: tuple[UnitState, ...]
    cases: Natural
    rows: Natural
    start_byte: Natural = 0
    end_byte: Natural
    digest: str  # sha256 of these bytes
    edit_seconds: Seconds
    probe_seconds: Seconds
    peak_bytes: Natural  # most memory of the process, or of the device where the model lies on one


class VoidRecord(msgspec.Struct, frozen=True, kw_only=True, tag="void"):
    """Units of a leg, recorded before this line, that count no longer."""

    leg: LegKey
    numbers: tuple[Annotated[int, Meta(ge=0)], ...]


class DamagedLogWarning(UserWarning):
    """Lines of a run's log that cannot be read; all others are used."""


def read_units(folder: str | Path) -> list[UnitRecord]:
    """Read the records of a run folder that count.

    Args:
        folder: The run folder.

    Returns:
        Records, in the order they were written.
    """
    return read_log(Path(folder), check_rows=False).live_records()


class Log(NamedTuple):
    """What a folder's progress file says."""

    records: list[UnitRecord]  # whole on disk, superseded units included
    voids: list[tuple[int, VoidRecord]]  # with the number of records before it
    good_lines: list[bytes]
    damage: list[str]
    units_of: dict[int, tuple[UnitState, ...]]  # as written, by start byte

    def live_records(self) -> list[UnitRecord]:
        """The records without superseded units."""
        live: list[UnitRecord] = []
        done = 0
        for count, void in self.voids:
            live = without_units(live + self.records[done:count], void)
            done = count
        return live + self.records[done:]


def without_units(records: Sequence[UnitRecord], void: VoidRecord) -> list[UnitRecord]:
    """Leave superseded units out of records.

    Args:
        records: Records before the line.
        void: The line.

    Returns:
        Records of the units that are left.
    """
    kept = []
    for record in records:
        if record.leg == void.leg:
            units = tuple(unit for unit in record.units if unit.number not in void.numbers)
            gone = len(record.units) - len(units)
            if gone:
                record = msgspec.structs.replace(  # noqa: PLW2901
                    record, units=units, cases=max(0, record.cases - gone)
                )
        if record.units:
            kept.append(record)
    return kept


def read_log(folder: Path, check_rows: bool = True) -> Log:
    """Read a folder's progress file, and compare it with the results.

    Args:
        folder: The run folder.
        check_rows: Whether to verify the rows of each record.

    Returns:
        What is whole, and what is damaged.
    """
    log = Log([], [], [], [], {})
    path = folder / PROGRESS
    if not path.is_file():
        return log
    lines = path.read_bytes().split(b"\n")[:-1]  # a line without its end was never finished
    decoder = msgspec.json.Decoder(UnitRecord | VoidRecord)
    results = folder / RESULTS
    size = results.stat().st_size if results.is_file() else 0
    with results.open("rb") if size else contextlib.nullcontext() as file:
        for number, line in enumerate(lines, 1):
            try:
                record = decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                is_torn = number == len(lines) and number > 1
                reason = "was not finished" if is_torn else f"cannot be read ({error})"
                log.damage.append(f"{PROGRESS}, line {number}: {reason}")
                continue
            if isinstance(record, VoidRecord):
                log.voids.append((len(log.records), record))
            else:
                reason = _row_damage(record, file, size) if check_rows else ""
                if reason:
                    where = f"{record.leg}, units {[u.number for u in record.units][:4]}"
                    log.damage.append(f"{PROGRESS}, line {number} ({where}): {reason}")
                    continue
                log.records.append(record)
                log.units_of[record.start_byte] = record.units
            log.good_lines.append(line)
    return log


def _row_damage(record: UnitRecord, file: IO[bytes] | None, size: int) -> str:
    """Why a record's rows do not count; empty if they are as they were written."""
    if not record.units:
        return "it names no unit"
    if file is None or not record.start_byte <= record.end_byte <= size:
        return f"its rows end at byte {record.end_byte}, the results at {size}"
    file.seek(record.start_byte)
    data = file.read(record.end_byte - record.start_byte)
    if hashlib.sha256(data).hexdigest() != record.digest:
        return f"its rows in {RESULTS} are not as they were written"
    if data.count(b"\n") != record.rows:
        return f"it counts {record.rows} rows, and there are {data.count(chr(10).encode())}"
    return ""
