"""The ledger of a run: one row per probe, appended as it is finished, safe against kill -9.

A run is a folder:

    settings.toml    what was asked for, as it was read
    results.jsonl    one `Row` per probe and scorer, in the order of the settings
    progress.jsonl   one `Unit` per append: which part, where it ends, its seconds and peak memory
    deltas/ pictures/ report.html

Rows of one unit are written, flushed and synced before its progress line, so the last good progress
line says how much of the results is whole; anything behind it is cut off on opening. Rows on disk
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

from errata.functional.atomic import whole_file
from errata.functional.errors import BadInput

__all__ = ["PROGRESS", "RESULTS", "Answer", "Ledger", "Part", "Row", "Unit", "locked", "read_rows"]

RESULTS, PROGRESS = "results.jsonl", "progress.jsonl"


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model answers to one probe."""

    text: str  # likeliest tokens at the answer's positions, under teacher forcing
    accuracy: float  # share of the target's tokens among them
    exact: bool  # all of them
    nll: float | None  # -log p of the target, nats per token; None where it is not finite
    said: str | None = None  # greedy generation, where it was asked for
    match: bool | None = None  # its first line equals the target or an alias, normalised
    entropy: float | None = None  # n-gram entropy of all of it, from three words on


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One probe of one case under one scorer, before and after the edit."""

    run: str  # hash of the settings and versions
    model: str  # name in the settings
    editor: str  # name in the settings
    protocol: str  # "single", "sequential" or "lifelong"
    moment: Literal["edit", "gap", "end", "length"]  # right after the edit, `gap` later, after all
    gap: int = 0  # edits made between this case's and this probe; "length": edits made in all
    number: int  # of the case, in the order of the settings
    case: str
    probe: str  # metric name, `functional.metrics.PROBES`
    index: int  # of the query among the probe's
    scorer: str
    seed: int
    prompt: str
    target: str
    images: tuple[str, ...] = ()  # content names; `pictures/<name>.png` where it was kept
    base: float | None  # success of the unedited model under the scorer, 0 to 1
    score: float | None  # the metric: success after the edit, or agreement for a locality
    before: Answer
    after: Answer
    kl: float | None = None  # KL(base || edited) at the answer, nats per token
    same: bool | None = None  # localities: what both say freely is the same, normalised
    ppl_r: float | None = None  # edits: PPL(x | q, x*) / PPL(q, x*) of the text x said behind x*
    versions: str
    seconds: float | None = None  # its share of the unit's; not in the results file, see above
    peak_bytes: int | None = None  # the unit's


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a unit stands: a model, an editor, a protocol, and its number of `of` in there."""

    model: str
    editor: str
    protocol: str
    number: int
    of: int


class Unit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One append: rows up to byte `end` of the results, and what they cost."""

    part: Part
    cases: int
    rows: int
    end: int
    digest: str  # sha256 of the unit's bytes
    edit_seconds: float
    probe_seconds: float
    peak_bytes: int  # most memory of the process, or of the device where the model lies on one


class Ledger:
    """Append-only results of one run folder; opening it drops whatever a kill left half-written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results = folder / RESULTS
        self._progress = folder / PROGRESS
        self.units = list(_whole_units(folder))
        self.end = self.units[-1].end if self.units else 0
        _cut(self._results, self.end)
        _replace_lines(self._progress, self.units)

    def leg(self, model: str, editor: str, protocol: str) -> list[Unit]:
        """The units of one model, editor and protocol that are on disk."""
        wanted = (model, editor, protocol)
        return [
            unit
            for unit in self.units
            if (unit.part.model, unit.part.editor, unit.part.protocol) == wanted
        ]

    def finished(self, model: str, editor: str, protocol: str) -> bool:
        """Whether every part of one leg is on disk."""
        leg = self.leg(model, editor, protocol)
        return bool(leg) and len(leg) == leg[0].part.of

    def append(
        self,
        part: Part,
        rows: Sequence[Row],
        *,
        cases: int,
        edit_seconds: float,
        probe_seconds: float,
        peak_bytes: int,
    ) -> None:
        """Write one part's rows and then the line that makes them count."""
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        _append(self._results, data, self.end)
        unit = Unit(
            part=part, cases=cases, rows=len(rows), end=self.end + len(data),
            digest=hashlib.sha256(data).hexdigest(), edit_seconds=round(edit_seconds, 4),
            probe_seconds=round(probe_seconds, 4), peak_bytes=peak_bytes,
        )  # fmt: skip
        _append(self._progress, msgspec.json.encode(unit) + b"\n", self._progress.stat().st_size)
        self.units.append(unit)
        self.end = unit.end


def read_rows(folder: str | Path) -> list[Row]:
    """Every whole row of a run folder, with what it cost, also while the run is going on.

    Raises BadInput when the folder holds no results, or results of another version.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise BadInput(f"a run folder must hold {RESULTS}; {folder} does not. Run `errata run`.")
    decoder = msgspec.json.Decoder(Row)
    try:
        rows = [decoder.decode(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except msgspec.DecodeError as fault:
        raise BadInput(
            f"{path} must hold one row per line as this version writes them: {fault}."
        ) from None
    costs = [
        (round((unit.edit_seconds + unit.probe_seconds) / unit.rows, 6), unit.peak_bytes)
        for unit in _whole_units(Path(folder))
        for _ in range(unit.rows)
    ]
    for number, (row, (seconds, peak)) in enumerate(zip(rows, costs)):
        rows[number] = msgspec.structs.replace(row, seconds=seconds, peak_bytes=peak)
    return rows


def _whole_units(folder: Path) -> Iterator[Unit]:
    """Units whose line is whole and whose rows are on disk as they were written."""
    results, progress = folder / RESULTS, folder / PROGRESS
    if not (results.is_file() and progress.is_file()):
        return
    decoder, start = msgspec.json.Decoder(Unit), 0
    with results.open("rb") as file:
        for line in progress.read_bytes().split(b"\n")[:-1]:
            try:
                unit = decoder.decode(line)
            except msgspec.DecodeError:
                return
            data = file.read(unit.end - start)
            if hashlib.sha256(data).hexdigest() != unit.digest:
                return
            start = unit.end
            yield unit


def _cut(path: Path, size: int) -> None:
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
        raise BadInput(
            f"{path} could not be written ({fault.strerror or fault}); what was finished before is "
            "kept: free space or mend the permissions, and run the same again."
        ) from fault


def _replace_lines(path: Path, units: Sequence[Unit]) -> None:
    data = b"".join(msgspec.json.encode(unit) + b"\n" for unit in units)
    if not path.is_file() or path.read_bytes() != data:
        with whole_file(path) as file:
            file.write(data)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock goes with the process, however it ends.

    Raises BadInput when another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"one process at a time may write a run folder, and {folder} is in use: wait for "
                "it, or give another `out`."
            ) from None
        yield
