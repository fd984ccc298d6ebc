"""Hostile numbers, names and shapes at the public boundary: one sentence each."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from errata import adapters
from errata.bench.runs.settings_file import parse_settings
from errata.editors import METHODS, configure, make_editor
from errata.functional import Query
from errata.functional.errors import ErrataError

RUN = """
output_dir = {output_dir}
num_threads = {threads}
seed = {seed}
[cases]
source = "world"
num_cases = {count}
[[models]]
id = {id}
[[editors]]
type = "lora"
rank = {rank}
[[protocols]]
type = "single"
"""
GOOD = {
    "output_dir": '"out"',
    "threads": "1",
    "seed": "0",
    "count": "1",
    "id": '"tiny/llava"',
    "rank": "4",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", "1000000000"),
        ("threads", "-1"),
        ("count", "1" + "0" * 30),
        ("seed", "9" * 23),
        ("seed", "9" * 5000),
        ("seed", "[" * 100_000),
        ("seed", "[" * 400 + "]" * 400),
        ("output_dir", '"a\\u0000b"'),
        ("output_dir", '""'),
        ("id", '"a\\u0000b"'),
        ("id", '".."'),
        ("id", '"tiny/llava\\n"'),
        ("rank", "1000000000"),
        ("rank", "nan"),
        ("rank", "0"),
    ],
)
def test_settings_of_runs(name, value, tmp_path, monkeypatch, capsys):
    from errata.bench.cli.main import main

    monkeypatch.chdir(tmp_path)
    parse_settings(RUN.format(**GOOD))
    (tmp_path / "run.toml").write_text(RUN.format(**GOOD | {name: value}))
    assert main(["run", "run.toml"]) == 2
    error = capsys.readouterr().err
    assert "internal error" not in error
    assert len(error) <= 2100
    assert error.strip().replace("\n", "").isprintable()
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.fixture(scope="module")
def model():
    return adapters.from_module(*adapters.tiny_model("llava"))


ODD = {
    "no query": [],
    "no target": [Query("who is it?", "")],
    "blank target": [Query("who is it?", " \n")],
    "lone surrogate": [Query("who is it?", "\ud800")],
    "lone surrogate in the prompt": [Query("\udfff", "bo")],
    "no text": [Query(3, "bo")],  # type: ignore[arg-type]
    "no query object": ["who is it?"],
    "NUL in a path": [Query("who is it?", "bo", images=("a\0b.png",))],
    "no image": [Query("who is it?", "bo", images=(3,))],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_queries_are_refused_alike_by_every_editor(model, method):
    is_trained = "untrained" in METHODS[method].config.__struct_fields__
    editor = make_editor(configure(method, **({"untrained": True} if is_trained else {})))
    state = editor.init(model, torch.Generator().manual_seed(0))
    for what, queries in ODD.items():
        for edit in (editor.edit, editor.edit_each):
            with pytest.raises(ErrataError) as refused:
                edit(model, state, queries)
            text = str(refused.value)
            assert len(text) <= 2000, what
            assert text.isprintable(), what


def test_one_image_is_a_tuple_of_one():
    image = Image.new("RGB", (4, 4))
    assert Query("who?", "bo", images=image).images == (image,)
    assert Query("who?", "bo", images="a.png").images == ("a.png",)


@pytest.mark.parametrize("config", ["[" * 100_000, '{"model_type": ' + "9" * 5000 + "}", "[]", "{"])
def test_odd_configs_of_checkpoints_are_one_sentence(tmp_path, config):
    module, processor = adapters.tiny_model("llava")
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ErrataError) as refused:
        adapters.from_pretrained(str(tmp_path))
    assert len(str(refused.value)) <= 2000


@pytest.mark.parametrize("identity", ["..", "a/../b", "a\0b", "llava\n", "", " ", "/", "x" * 10**5])
def test_odd_ids_of_models_are_one_sentence(identity, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ErrataError) as refused:
        adapters.from_pretrained(identity)
    assert len(str(refused.value)) <= 2000


def test_names_with_a_trailing_newline_are_no_names(tmp_path):
    from errata.functional.header import PARAMETER_NAME

    assert PARAMETER_NAME.fullmatch("a.b")
    assert not PARAMETER_NAME.fullmatch("a.b\n")
