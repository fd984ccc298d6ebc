"""Runs side by side: pairing by case, correction over probes, and what cannot be compared."""

import random

import msgspec
import pytest

from errata.bench.cli.main import main
from errata.bench.report import comparison
from errata.bench.storage.log_records import RESULTS
from errata.functional.errors import InvalidInputError
from tests.bench.storage.results_logs import row


def run(quality, count=60, seed=0, **more):
    draw = random.Random(seed)
    return [
        row(f"c{n}", probe, float(draw.random() < quality), **more)
        for n in range(count)
        for probe in ("reliability", "text_locality")
    ]


def test_differences_are_paired_by_case_whatever_the_order():
    one, two = run(0.5), run(0.5)
    random.Random(1).shuffle(two)
    (there,) = comparison.columns({"a": one, "b": two}).values()
    first, second = there.values()
    for found in comparison.compare(first, second):
        assert found.test.difference == 0.0
        assert found.p == 1.0


def test_only_shared_cases_count():
    one = [row("a", score=1.0), row("b", score=0.0)]
    two = [row("b", score=1.0), row("c", score=1.0)]
    (there,) = comparison.columns({"x": one, "y": two}).values()
    (found,) = comparison.compare(*there.values())
    assert (found.first, found.second, found.test.count) == (0.0, 1.0, 1)
    (there,) = comparison.columns({"x": one[:1], "y": two}).values()
    with pytest.raises(InvalidInputError, match="share none"):
        comparison.compare(*there.values())


def test_a_case_counts_once_however_many_queries_it_has():
    one = [row("a", index=i, score=0.0) for i in range(50)] + [row("b", score=1.0)]
    (there,) = comparison.columns({"x": one, "y": one}).values()
    (found,) = comparison.compare(*there.values())
    assert (found.first, found.test.count) == (0.5, 2)


def test_holm_keeps_order_and_never_exceeds_one():
    assert comparison.holm_correction([0.5, 0.001, 0.02, 0.9]) == [1.0, 0.004, 0.06, 1.0]
    assert comparison.holm_correction([]) == []


def test_a_clear_difference_is_marked_and_none_is_not():
    text = comparison.table({"a": run(0.3), "b": run(0.9, seed=1), "c": run(0.3)})
    blocks = text.split("\n\n")
    assert [block.splitlines()[0].split("    ")[0] for block in blocks] == [
        "a finetune  →  b finetune",
        "a finetune  →  c finetune",
        "b finetune  →  c finetune",
    ]
    assert all("***" in line for line in blocks[0].splitlines()[2:])
    assert "*" not in blocks[1]
    assert "60 cases" in blocks[0]


def test_one_run_compares_its_editors():
    text = comparison.table({"a": [*run(0.3), *run(0.9, seed=1, editor="lora")]})
    assert text.startswith("finetune  →  lora    single · scorer errata · 60 cases")


def test_nothing_to_compare_is_said():
    with pytest.raises(InvalidInputError, match="two editors or two runs .*; got a with finetune"):
        comparison.table({"a": run(0.5)})
    with pytest.raises(InvalidInputError, match="got a, b with finetune"):
        comparison.table({"a": run(0.5, scorer="errata"), "b": run(0.5, scorer="easyedit")})


def test_the_command_line_names_runs_by_their_folders(tmp_path, capsys):
    for name, quality in (("one", 0.2), ("two", 0.9)):
        (tmp_path / name).mkdir()
        lines = b"".join(msgspec.json.encode(r) + b"\n" for r in run(quality, seed=len(name)))
        (tmp_path / name / RESULTS).write_bytes(lines)
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "one finetune  →  two finetune" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "one")]) == 2
    assert "must be different folders" in capsys.readouterr().err
