"""The results log of a run: one row per probe, appended as it is finished, safe against kill -9.

A run is a folder:

    settings.toml    what was asked for, as it was read
    results.jsonl    one `ResultRow` per probe and scorer, in the order of the settings
    progress.jsonl   one `UnitRecord` per append: its units, its bytes, its seconds and peak memory
    deltas/ thumbnails/ report.html

Rows of an append are written, flushed and synced before its progress line, so the progress lines
say which bytes of the results count. What a kill left after the last of them is cut off on opening.
Each line names its own bytes and their digest, so a damaged line costs no other. Rows on disk carry
no times, so that a run killed and started again ends with the same bytes; `read_rows` adds them
from the units. Units that were superseded (a corrected record, say) are named by a `VoidRecord`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

from errata.bench.storage.log_records import (
    PROGRESS,
    RESULTS,
    DamagedLogWarning,
    LegKey,
    UnitRecord,
    UnitState,
    VoidRecord,
    read_log,
    without_units,
)
from errata.functional.errors import InvalidInputError, join_messages
from errata.functional.files import atomic_write

__all__ = [
    "ProbeAnswer",
    "ResultRow",
    "ResultsLog",
    "lock_folder",
    "read_rows",
]


class ProbeAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model answers to one probe."""

    text: str  # likeliest tokens at the answer's positions, under teacher forcing
    accuracy: float  # share of the target's tokens among them
    exact_match: bool  # all of them
    nll: float | None  # -log p of the target, nats per token; None where it is not finite
    generation: str | None = None  # greedy generation, where it was asked for
    generation_match: bool | None = None  # its first line equals the target or an alias, normalised
    ngram_entropy: float | None = None  # n-gram entropy of all of it, from three words on


class ResultRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One probe of one case under one scorer, before and after the edit."""

    run: str  # hash of the settings and versions
    model: str  # name in the settings
    editor: str  # name in the settings
    protocol: str  # "single", "sequential" or "lifelong"
    evaluated_at: Literal[
        "after_edit", "after_gap", "end", "after_length"
    ]  # right after the edit, `gap` later, after all
    gap: int = 0  # edits made between this case's and this probe; "after_length": edits made in all
    case_number: int  # of the case, in the order of the settings
    case: str
    probe: str  # metric name, `functional.metrics.PROBES`
    index: int  # of the query among the probe's
    scorer: str
    seed: int
    prompt: str
    target: str
    images: tuple[str, ...] = ()  # content names; `thumbnails/<name>.png` where it was kept
    base: float | None  # success of the unedited model under the scorer, 0 to 1
    score: float | None  # the metric: success after the edit, or agreement for a locality
    before: ProbeAnswer
    after: ProbeAnswer
    kl: float | None = None  # KL(base || edited) at the answer, nats per token
    generation_unchanged: bool | None = (
        None  # localities: what both say freely is the same, normalised
    )
    ppl_r: float | None = (
        None  # edits: PPL(x | q, x*) / PPL(q, x*) of the text x generated after x*
    )
    fault: str = ""  # why the edit was not made; `after` is then the base's answer
    versions: str
    seconds: float | None = None  # its share of the unit's; not in the results file, see above
    peak_bytes: int | None = None  # the unit's


class ResultsLog:
    """Append-only results of one run folder; opening it drops what a kill left half-written.

    Args:
        folder: The run folder.

    Attributes:
        folder: The run folder.
        records: The records on disk whose rows are whole, without superseded units.
        damage: What was found damaged, a sentence each; every good row is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results = folder / RESULTS
        self._progress = folder / PROGRESS
        log = read_log(folder)
        self.records = log.live_records()
        self.damage = log.damage
        self._results.touch()
        if log.damage:
            _keep_copy(self._progress)
        else:  # bytes after the last record are what a kill left; of a damaged log they may count
            _truncate(self._results, max((r.end_byte for r in log.records), default=0))
        self.end_byte = self._results.stat().st_size
        data = b"".join(line + b"\n" for line in log.good_lines)
        if not self._progress.is_file() or self._progress.read_bytes() != data:
            with atomic_write(self._progress) as file:
                file.write(data)

    def units_of(self, leg: LegKey) -> dict[int, UnitState]:
        """The units of one leg that are on disk.

        Args:
            leg: The leg.

        Returns:
            Units by number.
        """
        return {
            unit.number: unit
            for record in self.records
            if record.leg == leg
            for unit in record.units
        }

    def legs(self) -> list[LegKey]:
        """The legs with units on disk, in the order of their first."""
        return list(dict.fromkeys(record.leg for record in self.records))

    def num_cases(self, leg: LegKey) -> int:
        """Count the edits of a leg.

        Args:
            leg: The leg.

        Returns:
            Edits on disk.
        """
        return sum(record.cases for record in self.records if record.leg == leg)

    def void(self, leg: LegKey, numbers: Sequence[int]) -> None:
        """Declare units superseded; their rows stay in the file and count no longer.

        Args:
            leg: The leg.
            numbers: Numbers of the units.
        """
        record = VoidRecord(leg=leg, numbers=tuple(sorted(numbers)))
        _append(self._progress, msgspec.json.encode(record) + b"\n", self._progress.stat().st_size)
        self.records = without_units(self.records, record)

    def append(
        self,
        leg: LegKey,
        units: Sequence[UnitState],
        rows: Sequence[ResultRow],
        *,
        cases: int,
        edit_seconds: float,
        probe_seconds: float,
        peak_bytes: int,
    ) -> None:
        """Write the rows of some units, and then the line that makes them count.

        Args:
            leg: The leg.
            units: The units.
            rows: Their rows.
            cases: Edits made.
            edit_seconds: Time spent on edits.
            probe_seconds: Time spent on evaluation.
            peak_bytes: Peak memory.
        """
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        _append(self._results, data, self.end_byte)
        record = UnitRecord(
            leg=leg,
            units=tuple(units),
            cases=cases,
            rows=len(rows),
            start_byte=self.end_byte,
            end_byte=self.end_byte + len(data),
            digest=hashlib.sha256(data).hexdigest(),
            edit_seconds=round(edit_seconds, 4),
            probe_seconds=round(probe_seconds, 4),
            peak_bytes=peak_bytes,
        )
        _append(self._progress, msgspec.json.encode(record) + b"\n", self._progress.stat().st_size)
        self.records.append(record)
        self.end_byte = record.end_byte


def read_rows(folder: str | Path) -> list[ResultRow]:
    """Read every row of a run folder that counts, with its cost, also during the run.

    Warns with `DamagedLogWarning` of lines that cannot be read.

    Args:
        folder: The run folder.

    Returns:
        Rows.

    Raises:
        InvalidInputError: If the folder holds no results, or results of another version.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise InvalidInputError(
            f"a run folder must hold {RESULTS}; {folder} does not. Run `errata run`."
        )
    if not (path.parent / PROGRESS).is_file():  # rows of one's own making
        return _decode_rows(path, path.read_bytes().split(b"\n")[:-1])
    log = read_log(path.parent)
    _warn(log.damage)
    rows: list[ResultRow] = []
    with path.open("rb") as file:
        for record in log.live_records():
            file.seek(record.start_byte)
            lines = file.read(record.end_byte - record.start_byte).split(b"\n")[:-1]
            seconds = round((record.edit_seconds + record.probe_seconds) / max(1, record.rows), 6)
            numbers = {unit.number for unit in record.units}
            rows += [
                msgspec.structs.replace(row, seconds=seconds, peak_bytes=record.peak_bytes)
                for row in _decode_rows(path, lines)
                if len(log.units_of[record.start_byte]) == 1 or row.case_number in numbers
            ]
    return rows


def _decode_rows(path: Path, lines: Sequence[bytes]) -> list[ResultRow]:
    decoder = msgspec.json.Decoder(ResultRow)
    try:
        return [decoder.decode(line) for line in lines]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise InvalidInputError(
            f"{path} must hold one row per line as this version writes them: {fault}."
        ) from None


def _warn(damage: Sequence[str]) -> None:
    if damage:
        warnings.warn(
            f"the log of this run is damaged: {join_messages(damage)}. All other rows are used; "
            "run the same settings again to make the rest.",
            DamagedLogWarning,
            stacklevel=3,
        )


def _keep_copy(path: Path) -> None:
    """Keep a damaged file under another name before it is repaired."""
    number = 1
    while (copy := path.with_suffix(f".damaged-{number}")).exists():
        number += 1
    shutil.copyfile(path, copy)


def _truncate(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        with path.open("r+b") as file:
            file.truncate(size)
            _sync(file)


def _append(path: Path, data: bytes, start: int) -> None:
    """Append to a file that ends at `start`; when that fails, the file is as it was."""
    try:
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                _sync(file)
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(start)
                raise
    except OSError as fault:
        raise InvalidInputError(
            f"{path} could not be written ({fault.strerror or fault}); what was finished before is "
            "kept: free space or mend the permissions, and run the same again."
        ) from fault


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process; the lock ends with the process, however it ends.

    Args:
        folder: The run folder.

    Yields:
        Nothing.

    Raises:
        InvalidInputError: If another process holds it.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInputError(
                f"one process at a time may write a run folder, and {folder} is in use: wait for "
                "it, or give another `output_dir`."
            ) from None
        yield
