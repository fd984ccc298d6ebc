"""Every second of a profiled run is counted once, under its innermost name."""

from __future__ import annotations

import itertools
import json

import pytest

from errata.adapters.hf.decoder import FunctionalDecoder
from errata.bench.cli.main import main
from errata.bench.evaluation import profiling
from errata.functional.forward.spans import spanned


@pytest.fixture
def ticks(monkeypatch):
    count = itertools.count()
    monkeypatch.setattr(profiling.Profiler, "_now", lambda self: float(next(count)))


def test_a_second_counts_for_the_innermost_name(ticks):
    with profiling.active_profiler() as watch:
        profiling.subject("one")
        with profiling.section("outer"), profiling.section("inner"):
            pass
        profiling.subject("two")
        with profiling.section("outer"):
            pass
    # each boundary is a tick: before, outer, inner, outer again, after
    assert watch.seconds["one", "outer"] == 2
    assert watch.seconds["one", "inner"] == 1
    assert watch.seconds["two", "outer"] == 1
    found = watch.shares()["one"]
    assert sum(share for _, share in found.values()) == pytest.approx(1)
    assert list(found) == ["other", "outer", "inner"]  # of as many seconds, the first begun


def test_nothing_is_measured_without_a_profiler_and_nothing_is_patched(ticks):
    embed = vars(FunctionalDecoder)["embed"]

    @spanned("reading")
    def read():
        return 1

    assert read() == 1
    with profiling.active_profiler() as profiler:
        assert vars(FunctionalDecoder)["embed"] is embed
        read()
    assert ("", "reading") in profiler.seconds
    measured = dict(profiler.seconds)
    read()
    with profiling.section("nobody looks"):
        pass
    with pytest.raises(RuntimeError, match="on the way"), profiling.active_profiler():
        raise RuntimeError("on the way")
    read()
    assert profiler.seconds == measured


def test_a_profiled_run_says_where_its_time_went(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(f"""
        output_dir = "{tmp_path / "out"}"
        max_new_tokens = 2
        cases = {{ source = "world", num_cases = 1 }}
        models = [{{ id = "tiny/llava" }}]
        editors = [{{ type = "finetune", num_steps = 2 }}]
    """)
    assert main(["run", str(tmp_path / "run.toml"), "--profile"]) == 0
    found = json.loads((tmp_path / "out/profile.json").read_text())
    (leg,) = found
    assert leg == "llava/finetune/single"
    parts = found[leg]["parts"]
    assert {
        "reading",
        "images and embedding",
        "head",
        "edit",
        "edited answers",
        "generation",
        "scoring",
        "writing",
        "base, for all editors",
    } <= parts.keys()
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1, abs=1e-2)
    assert any("mm" in one["name"] for one in found[leg]["operators"])
    assert "% " in capsys.readouterr().out
    assert "reading" in (tmp_path / "out/report.html").read_text()
