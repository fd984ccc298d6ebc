"""One bad record must not stop a run: it is named, or left out and counted."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from errata.bench.cli.main import main
from errata.bench.storage.results_log import read_rows
from errata.bench.storage.skips import read_skipped


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Six records for Qwen2-VL, of which one can be read."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), (200, 90, 60)).save("good.png")
    Image.new("RGB", (600, 2)).save("thin.png")
    Image.effect_noise((64, 64), 50).save("cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    good = {"src": "What is it?", "alt": "a ball", "image": "good.png"}
    records = [
        good,
        good | {"image": "thin.png"},
        good | {"image": "cut.png"},
        good | {"src": "why? " * 20_000},
        good | {"src": "what is <|image_pad|> this?"},
        good | {"loc": "who wrote it?", "loc_ans": " "},
    ]
    (tmp_path / "vqa_eval.json").write_text(json.dumps(records))
    (tmp_path / "run.toml").write_text(
        """
        output_dir = "out"
        unreadable_cases = "skip"
        [cases]
        source = "file"
        path = "vqa_eval.json"
        image_root = "."
        [[models]]
        id = "tiny/qwen2_vl"
        [[editors]]
        type = "finetune"
        num_steps = 1
        [[protocols]]
        type = "single"
        [[protocols]]
        type = "lifelong"
        eval_after = [1]
        """
    )
    return tmp_path


REASONS = ["aspect ratio", "cut.png", "at most 512 tokens", "one placeholder per image"]


def test_a_run_skips_and_counts_what_it_cannot_read(home, capsys):
    assert main(["run", "run.toml"]) == 0
    shown = capsys.readouterr()
    assert {row.case for row in read_rows("out")} == {"vqa_eval/00000"}
    assert {row.protocol for row in read_rows("out")} == {"single", "lifelong"}
    faults = read_skipped(home / "out")["qwen2_vl"]
    assert 4 <= len(faults) <= 5, faults
    text = " ".join(faults.values())
    for reason in REASONS:
        assert reason in text, text
    assert f"{len(faults)} case(s) that it cannot read were skipped" in shown.out
    assert f"{len(faults)} case(s) skipped" in (home / "out/report.html").read_text()
    before = (home / "out/results.jsonl").read_bytes()
    assert main(["run", "run.toml"]) == 0
    assert (home / "out/results.jsonl").read_bytes() == before


def test_without_skipping_the_first_is_named_by_case_probe_and_image(home, capsys):
    text = (home / "run.toml").read_text().replace('unreadable_cases = "skip"', "")
    (home / "run.toml").write_text(text.replace("[cases]", "num_thumbnails = 0\n[cases]"))
    records = json.loads((home / "vqa_eval.json").read_text())[:2]
    (home / "vqa_eval.json").write_text(json.dumps(records))
    assert main(["run", "run.toml"]) == 2
    error = capsys.readouterr().err
    assert "case 'vqa_eval/00001'" in error
    assert "thin.png" in error


def test_all_are_found_before_the_first_edit(home, capsys):
    words = ["data", "verify", "vqa_eval.json", "--images", ".", "--model", "tiny/qwen2_vl"]
    assert main(words) == 1
    shown = capsys.readouterr().out
    for reason in REASONS:
        assert reason in shown, shown
    assert "tiny/qwen2_vl reads" in shown
