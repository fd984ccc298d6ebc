"""Names in files are printed with their control characters escaped, in tables and in JSON."""

from __future__ import annotations

import json
import unicodedata

import msgspec
import pytest
import torch

from errata.bench.cli.main import main
from errata.bench.runs.escaping import escape
from errata.functional import BaseModel, Delta, EditRecord, Header, save_delta
from errata.functional.deltas import serialization
from errata.functional.kinds.schema import Dense
from tests.bench.storage.results_logs import row

NASTY = "a\x1b[31mred\x9b2J\u202egnp.txt\u2066\x07\x7f\r\u200b\U000e0041"


def plain(text: str) -> bool:
    return all(
        char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") for char in text
    )


def test_every_control_and_format_character_is_escaped():
    for code in range(0x110000):
        char = chr(code)
        shown = escape(char)
        if char in "\n\t":
            assert shown == char
        elif unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in (
            ["LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"]
        ):
            assert shown.startswith("\\u"), hex(code)
        assert json.loads(f'"{escape(json.dumps(char, ensure_ascii=False)[1:-1])}"') == char


def run(capsys, *words) -> str:
    main([*map(str, words)])
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.fixture
def delta(tmp_path, monkeypatch):
    """A delta whose settings, ids and image names are hostile."""
    monkeypatch.setattr(serialization, "validate_header", lambda header: [], raising=False)
    header = Header(
        base=BaseModel(id="a/model"),
        editor="lora",
        settings={f"k{NASTY}": NASTY, "deep": [{NASTY: [NASTY]}]},
        entries=(Dense(name="w", checkpoint_name="w", shape=(2,)),),
        edits=(EditRecord(id="one"),),
    )
    save_delta(tmp_path / "d.safetensors", Delta(header, {"w": torch.ones(2)}))
    return tmp_path / "d.safetensors"


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_settings_of_a_delta(delta, capsys, words):
    text = run(capsys, "inspect", delta, *words)
    assert "red" in text
    assert plain(text)
    if words:
        assert json.loads(text)["settings"][f"k{NASTY}"] == NASTY


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", NASTY),
        ("run", NASTY),
        ("generate", "--model", NASTY, "--prompt", "x"),
        ("editors", NASTY),
        (
            "edit",
            "--model",
            "micro/llava",
            "--prompt",
            "q",
            "--target",
            "t",
            "--set",
            NASTY,
            "-o",
            "x",
        ),
        (NASTY,),
    ],
)
def test_words_of_the_command_line(words, capsys):
    try:
        text = run(capsys, *words)
    except SystemExit:  # argparse
        text = "".join(capsys.readouterr())
    assert text
    assert plain(text)


@pytest.mark.parametrize("style", ["terminal", "markdown", "latex", "json"])
def test_names_in_results(tmp_path, capsys, style):
    rows = [row(f"c{NASTY}", editor=f"e{NASTY}", model=f"m{NASTY}", probe=f"p{NASTY}")]
    data = b"".join(msgspec.json.encode(one) + b"\n" for one in rows)
    (tmp_path / "results.jsonl").write_bytes(data)
    text = run(capsys, "report", tmp_path, "--format", style)
    assert "red" in text
    assert plain(text)
