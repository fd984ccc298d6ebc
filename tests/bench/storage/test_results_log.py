from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import msgspec
import pytest

from errata.bench.storage import results_log
from errata.bench.storage.log_records import DamagedLogWarning, LegKey, UnitState
from errata.bench.storage.results_log import (
    ProbeAnswer,
    ResultRow,
    ResultsLog,
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


LEG = LegKey(model="m", editor="e", protocol="single")


def part(number: int) -> list[UnitState]:
    return [UnitState(number=number, key=f"k{number}")]


def fill(folder: Path, numbers) -> ResultsLog:
    log = ResultsLog(folder)
    for number in numbers:
        rows = [row(number, probe) for probe in ("reliability", "rephrase")]
        log.append(
            LEG,
            part(number),
            rows,
            cases=1,
            edit_seconds=random.random(),
            probe_seconds=0.1,
            peak_bytes=7,
        )
    return log


def numbers(log: ResultsLog) -> list[int]:
    return sorted(log.units_of(LEG))


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
    for number, unit in enumerate(log.records):
        share = (unit.edit_seconds + unit.probe_seconds) / 2
        for one in rows[2 * number : 2 * number + 2]:
            assert one.seconds == pytest.approx(share, abs=1e-5)
            assert one.peak_bytes == 7
    assert b"seconds" not in (tmp_path / "results.jsonl").read_bytes()


def test_units_are_known_by_leg_and_number(tmp_path):
    fill(tmp_path, range(3))
    log = fill(tmp_path, [3])
    assert log.units_of(LEG) == {n: part(n)[0] for n in range(4)}
    assert log.units_of(LegKey(model="m", editor="e", protocol="sequential")) == {}
    assert (log.legs(), log.num_cases(LEG)) == ([LEG], 4)


def test_every_cut_of_either_file_is_mended_to_the_same_bytes(tmp_path):
    """A kill can leave any prefix of the last append: of the rows, or of the progress line."""
    whole = tmp_path / "whole"
    whole.mkdir()
    fill(whole, range(4))
    want = (whole / "results.jsonl").read_bytes()
    before = ResultsLog(whole).records
    start = before[2].end_byte
    sizes = [start, start + 1, start + 37, len(want) - 1, len(want)]
    lines = (whole / "progress.jsonl").read_bytes().splitlines(keepends=True)
    for size in sizes:
        for tail in (b"", lines[3][:1], lines[3][:-1]):
            folder = tmp_path / f"{size}-{tail[:1]!r}-{len(tail)}"
            folder.mkdir()
            (folder / "results.jsonl").write_bytes(want[:size])
            (folder / "progress.jsonl").write_bytes(b"".join(lines[:3]) + tail)
            log = ResultsLog(folder)
            assert numbers(log) == [0, 1, 2]
            assert log.damage == []
            assert (folder / "results.jsonl").read_bytes() == want[:start]
            fill(folder, [3])
            assert (folder / "results.jsonl").read_bytes() == want


def test_rows_that_were_changed_on_disk_are_named_and_made_again(tmp_path):
    fill(tmp_path, range(4))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"c/2"', b'"c/9"'))
    with pytest.warns(DamagedLogWarning, match="not as they were written"):
        assert {one.case for one in read_rows(tmp_path)} == {"c/0", "c/1", "c/3"}
    log = ResultsLog(tmp_path)
    assert numbers(log) == [0, 1, 3], "a good unit after a bad one is kept"
    assert "line 3 (m/e/single, units [2])" in log.damage[0]
    assert (tmp_path / "progress.damaged-1").is_file(), "nothing is lost by the repair"
    log = fill(tmp_path, [2])
    assert log.damage == []
    assert sorted({one.case for one in read_rows(tmp_path)}) == ["c/0", "c/1", "c/2", "c/3"]


RECORD = {
    "type": "unit",
    "leg": {"model": "m", "editor": "e", "protocol": "single"},
    "units": [{"number": 1}],
    "cases": 1,
    "rows": 1,
    "end_byte": 3,
    "digest": "",
    "edit_seconds": 0.0,
    "probe_seconds": 0.0,
    "peak_bytes": 0,
}


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"\xff\xfe",
        b"{}",
        b"[" * 100_000,
        b'{"type":"unit","end_byte":' + b"9" * 5000 + b"}",
        *(
            msgspec.json.encode(RECORD | change)
            for change in (
                {"end_byte": -1},
                {"end_byte": 1 << 62},
                {"end_byte": (1 << 62) - 1},
                {"start_byte": 2, "end_byte": 1},
                {"rows": 10**12},
                {"units": []},
                {"units": [{"number": -1}]},
                {"cases": -3},
                {"edit_seconds": -1.0},
            )
        ),
    ],
    ids=lambda line: line[:20].decode(errors="replace"),
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_damaged_line_costs_no_other(tmp_path, line, place):
    fill(tmp_path, range(3))
    want = [one.case for one in read_rows(tmp_path)]
    path = tmp_path / "progress.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:place], line + b"\n", *lines[place:]]))
    with pytest.warns(DamagedLogWarning, match=f"line {place + 1}"):
        assert [one.case for one in read_rows(tmp_path)] == want
    log = ResultsLog(tmp_path)
    assert numbers(log) == [0, 1, 2]
    assert len(log.damage) == 1
    assert len(log.damage[0]) < 1000
    assert ResultsLog(tmp_path).damage == [], "repaired once"
    fill(tmp_path, [3])
    assert [one.case for one in read_rows(tmp_path)] == [*want, "c/3", "c/3"]


def test_superseded_units_count_no_longer(tmp_path):
    log = fill(tmp_path, range(2))
    log.append(
        LEG,
        [UnitState(number=2), UnitState(number=3)],
        [row(2), row(3)],
        cases=2,
        edit_seconds=0.0,
        probe_seconds=0.0,
        peak_bytes=0,
    )
    log.void(LEG, [1, 3])
    assert numbers(log) == [0, 2]
    assert log.num_cases(LEG) == 2
    assert [one.case for one in read_rows(tmp_path)] == ["c/0", "c/0", "c/2"]
    assert numbers(fill(tmp_path, [3, 1])) == [0, 1, 2, 3]
    assert [one.case for one in read_rows(tmp_path)] == [
        "c/0",
        "c/0",
        "c/2",
        "c/3",
        "c/3",
        "c/1",
        "c/1",
    ]
    assert numbers(ResultsLog(tmp_path)) == [0, 1, 2, 3]


def test_rows_without_progress_lines_are_dropped(tmp_path):
    fill(tmp_path, range(2))
    (tmp_path / "progress.jsonl").unlink()
    assert ResultsLog(tmp_path).records == []
    assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_a_full_disk_leaves_the_results_as_they_were(tmp_path, monkeypatch):
    log = fill(tmp_path, range(2))
    want = (tmp_path / "results.jsonl").read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results_log, "_sync", full)
    with pytest.raises(InvalidInputError, match="No space .* kept"):
        log.append(LEG, part(2), [row(2)], cases=1, edit_seconds=0, probe_seconds=0, peak_bytes=0)
    assert (tmp_path / "results.jsonl").read_bytes() == want
    monkeypatch.undo()
    assert len(ResultsLog(tmp_path).records) == 2


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
