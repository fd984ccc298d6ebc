from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import msgspec
import pytest

from errata.bench.storage import results_log
from errata.bench.storage.results_log import (
    ProbeAnswer,
    ResultRow,
    ResultsLog,
    UnitKey,
    lock_folder,
    read_rows,
)
from errata.functional.errors import InvalidInputError


def row(number: int, probe: str = "reliability") -> ResultRow:
    answer = ProbeAnswer(text="öl", accuracy=0.5, exact_match=False, nll=1.25)
    return ResultRow(
        run="r",
        model="m",
        editor="e",
        protocol="single",
        evaluated_at="after_edit",
        case_number=number,
        case=f"c/{number}",
        probe=probe,
        index=0,
        scorer="errata",
        seed=0,
        prompt="who?",
        target="bo",
        base=0.0,
        score=None,
        before=answer,
        after=answer,
        versions="v",
    )


def part(number: int, of: int = 4) -> UnitKey:
    return UnitKey(model="m", editor="e", protocol="single", number=number, num_units=of)


def fill(folder: Path, numbers, of: int = 4) -> ResultsLog:
    log = ResultsLog(folder)
    for number in numbers:
        rows = [row(number, probe) for probe in ("reliability", "rephrase")]
        log.append(
            part(number, of),
            rows,
            cases=1,
            edit_seconds=random.random(),
            probe_seconds=0.1,
            peak_bytes=7,
        )
    return log


def test_rows_come_back_as_they_were_written(tmp_path):
    fill(tmp_path, range(3))
    rows = read_rows(tmp_path)
    bare = [msgspec.structs.replace(one, seconds=None, peak_bytes=None) for one in rows]
    assert bare == [row(n, p) for n in range(3) for p in ("reliability", "rephrase")]
    assert rows[0].score is None
    assert rows[0].before.text == "öl"


def test_what_a_unit_cost_comes_back_with_its_rows_but_not_in_the_file(tmp_path):
    log = fill(tmp_path, range(2))
    rows = read_rows(tmp_path)
    for number, unit in enumerate(log.units):
        share = (unit.edit_seconds + unit.probe_seconds) / 2
        for one in rows[2 * number : 2 * number + 2]:
            assert one.seconds == pytest.approx(share, abs=1e-5)
            assert one.peak_bytes == 7
    assert b"seconds" not in (tmp_path / "results.jsonl").read_bytes()


def test_a_leg_is_finished_when_all_its_parts_are_there(tmp_path):
    log = fill(tmp_path, range(3))
    assert not log.is_complete("m", "e", "single")
    log = fill(tmp_path, [3])
    assert log.is_complete("m", "e", "single")
    assert not log.is_complete("m", "e", "sequential")
    assert [unit.unit.number for unit in log.units_of("m", "e", "single")] == [0, 1, 2, 3]


def test_every_cut_of_either_file_is_mended_to_the_same_bytes(tmp_path):
    """A kill can leave any prefix of the last append: of the rows, or of the progress line."""
    whole = tmp_path / "whole"
    whole.mkdir()
    fill(whole, range(4))
    want = (whole / "results.jsonl").read_bytes()
    before = ResultsLog(whole).units
    start = before[2].end_byte
    sizes = [start, start + 1, start + 37, len(want) - 1, len(want)]
    lines = (whole / "progress.jsonl").read_bytes().splitlines(keepends=True)
    for size in sizes:
        for tail in (b"", lines[3][:1], lines[3][:-1], b"\xff\n"):
            folder = tmp_path / f"{size}-{tail[:1]!r}-{len(tail)}"
            folder.mkdir()
            (folder / "results.jsonl").write_bytes(want[:size])
            (folder / "progress.jsonl").write_bytes(b"".join(lines[:3]) + tail)
            log = ResultsLog(folder)
            assert [unit.unit.number for unit in log.units] == [0, 1, 2]
            assert (folder / "results.jsonl").read_bytes() == want[:start]
            fill(folder, [3])
            assert (folder / "results.jsonl").read_bytes() == want


def test_rows_that_were_changed_on_disk_are_made_again(tmp_path):
    fill(tmp_path, range(4))
    path = tmp_path / "results.jsonl"
    want = path.read_bytes()
    path.write_bytes(want.replace(b'"c/2"', b'"c/9"'))
    log = ResultsLog(tmp_path)
    assert [unit.unit.number for unit in log.units] == [0, 1]
    fill(tmp_path, [2, 3])
    assert path.read_bytes() == want


def test_rows_without_progress_lines_are_dropped(tmp_path):
    fill(tmp_path, range(2))
    (tmp_path / "progress.jsonl").unlink()
    assert ResultsLog(tmp_path).units == []
    assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_a_full_disk_leaves_the_results_as_they_were(tmp_path, monkeypatch):
    log = fill(tmp_path, range(2))
    want = (tmp_path / "results.jsonl").read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results_log, "_sync", full)
    with pytest.raises(InvalidInputError, match="No space .* kept"):
        log.append(part(2), [row(2)], cases=1, edit_seconds=0, probe_seconds=0, peak_bytes=0)
    assert (tmp_path / "results.jsonl").read_bytes() == want
    monkeypatch.undo()
    assert len(ResultsLog(tmp_path).units) == 2


def test_one_process_at_a_time(tmp_path):
    with lock_folder(tmp_path), pytest.raises(InvalidInputError, match="one process at a time"):
        lock_folder(tmp_path).__enter__()
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_reading_says_what_is_missing_or_foreign(tmp_path):
    with pytest.raises(InvalidInputError, match=r"must hold results\.jsonl"):
        read_rows(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(msgspec.json.encode({"run": 3}) + b"\n")
    with pytest.raises(InvalidInputError, match="one row per line"):
        read_rows(tmp_path)


def test_a_torn_last_line_is_not_a_row_yet(tmp_path):
    fill(tmp_path, range(1))
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"run":"r","mod')
    assert len(read_rows(tmp_path)) == 2
