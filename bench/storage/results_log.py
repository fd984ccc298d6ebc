"""The results log of a run: one row per probe, appended as it is finished, safe against kill -9.

A run is a folder:

    settings.toml    what was asked for, as it was read
    results.jsonl    one `Row` per probe and scorer, in the order of the settings
    progress.jsonl   one `Unit` per append: which part, where it ends, its seconds and peak memory
    deltas/ thumbnails/ report.html

Rows of one unit are written, flushed and synced before its progress line, so the last good progress
line says how much of the results is whole; anything after it is cut off on opening. Rows on disk
carry no times, so that a run killed and started again ends with the same bytes; `read_rows` adds
them from the units.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

from errata.functional.errors import InvalidInputError
from errata.functional.files import atomic_write

__all__ = [
    "PROGRESS",
    "RESULTS",
    "ProbeAnswer",
    "ResultRow",
    "ResultsLog",
    "UnitKey",
    "UnitRecord",
    "lock_folder",
    "read_rows",
]

RESULTS, PROGRESS = "results.jsonl", "progress.jsonl"


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
    versions: str
    seconds: float | None = None  # its share of the unit's; not in the results file, see above
    peak_bytes: int | None = None  # the unit's


class UnitKey(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a unit stands: a model, an editor, a protocol, and its number of `of` in there."""

    model: str
    editor: str
    protocol: str
    number: int
    num_units: int


class UnitRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One append: rows up to byte `end` of the results, and what they cost."""

    unit: UnitKey
    cases: int
    rows: int
    end_byte: int
    digest: str  # sha256 of the unit's bytes
    edit_seconds: float
    probe_seconds: float
    peak_bytes: int  # most memory of the process, or of the device where the model lies on one


class ResultsLog:
    """Append-only results of one run folder; opening it drops whatever a kill left half-written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results = folder / RESULTS
        self._progress = folder / PROGRESS
        self.units = list(_complete_units(folder))
        self.end_byte = self.units[-1].end_byte if self.units else 0
        _truncate(self._results, self.end_byte)
        _rewrite_progress(self._progress, self.units)

    def units_of(self, model: str, editor: str, protocol: str) -> list[UnitRecord]:
        """The units of one leg that are on disk.

        Args:
            model: Name of the model.
            editor: Name of the editor.
            protocol: Name of the protocol.

        Returns:
            Records.
        """
        wanted = (model, editor, protocol)
        return [
            unit
            for unit in self.units
            if (unit.unit.model, unit.unit.editor, unit.unit.protocol) == wanted
        ]

    def is_complete(self, model: str, editor: str, protocol: str) -> bool:
        """Whether every unit of a leg is on disk.

        Args:
            model: Name of the model.
            editor: Name of the editor.
            protocol: Name of the protocol.

        Returns:
            True or False.
        """
        leg = self.units_of(model, editor, protocol)
        return bool(leg) and len(leg) == leg[0].unit.num_units

    def append(
        self,
        unit_key: UnitKey,
        rows: Sequence[ResultRow],
        *,
        cases: int,
        edit_seconds: float,
        probe_seconds: float,
        peak_bytes: int,
    ) -> None:
        """Write the rows of a unit, and then the line that makes them count.

        Args:
            unit_key: Leg and number of the unit.
            rows: Its rows.
            cases: Its cases.
            edit_seconds: Time spent on edits.
            probe_seconds: Time spent on evaluation.
            peak_bytes: Peak memory.
        """
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        _append(self._results, data, self.end_byte)
        unit = UnitRecord(
            unit=unit_key,
            cases=cases,
            rows=len(rows),
            end_byte=self.end_byte + len(data),
            digest=hashlib.sha256(data).hexdigest(),
            edit_seconds=round(edit_seconds, 4),
            probe_seconds=round(probe_seconds, 4),
            peak_bytes=peak_bytes,
        )
        _append(self._progress, msgspec.json.encode(unit) + b"\n", self._progress.stat().st_size)
        self.units.append(unit)
        self.end_byte = unit.end_byte


def read_rows(folder: str | Path) -> list[ResultRow]:
    """Read every complete row of a run folder, with its cost, also during the run.

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
    decoder = msgspec.json.Decoder(ResultRow)
    try:
        rows = [decoder.decode(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except msgspec.DecodeError as fault:
        raise InvalidInputError(
            f"{path} must hold one row per line as this version writes them: {fault}."
        ) from None
    costs = [
        (round((unit.edit_seconds + unit.probe_seconds) / unit.rows, 6), unit.peak_bytes)
        for unit in _complete_units(Path(folder))
        for _ in range(unit.rows)
    ]
    for number, (row, (seconds, peak)) in enumerate(zip(rows, costs)):
        rows[number] = msgspec.structs.replace(row, seconds=seconds, peak_bytes=peak)
    return rows


def _complete_units(folder: Path) -> Iterator[UnitRecord]:
    """Units whose line is whole and whose rows are on disk as they were written."""
    results, progress = folder / RESULTS, folder / PROGRESS
    if not (results.is_file() and progress.is_file()):
        return
    decoder, start = msgspec.json.Decoder(UnitRecord), 0
    with results.open("rb") as file:
        for line in progress.read_bytes().split(b"\n")[:-1]:
            try:
                unit = decoder.decode(line)
            except msgspec.DecodeError:
                return
            data = file.read(unit.end_byte - start)
            if hashlib.sha256(data).hexdigest() != unit.digest:
                return
            start = unit.end_byte
            yield unit


def _truncate(path: Path, size: int) -> None:
    path.touch()
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


def _rewrite_progress(path: Path, units: Sequence[UnitRecord]) -> None:
    data = b"".join(msgspec.json.encode(unit) + b"\n" for unit in units)
    if not path.is_file() or path.read_bytes() != data:
        with atomic_write(path) as file:
            file.write(data)


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
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInputError(
                f"one process at a time may write a run folder, and {folder} is in use: wait for "
                "it, or give another `output_dir`."
            ) from None
        yield
