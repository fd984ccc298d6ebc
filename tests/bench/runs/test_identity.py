"""A run's identity is its bytes: what changed is refused by name, what is new is added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from errata.adapters import tiny_model
from errata.bench.cli.main import main
from errata.bench.runs import runner
from errata.bench.storage.results_log import read_rows


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A checkpoint, two annotated images, and settings for both."""
    monkeypatch.chdir(tmp_path)
    module, processor = tiny_model("llava")
    module.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(3):
        color = (60 * number, 200, 90)
        Image.new("RGB", (40, 32), color).save(tmp_path / "images" / f"{number}.png")
    write_records(tmp_path, ["a red ball", "two dogs"])
    write_settings(tmp_path)
    return tmp_path


def write_records(home: Path, answers: list[str]) -> None:
    records = [
        {"src": f"What is number {n}?", "alt": answer, "image": f"{n}.png"}
        for n, answer in enumerate(answers)
    ]
    (home / "vqa_eval.json").write_text(json.dumps(records))


def write_settings(home: Path, editors=("finetune",), protocols=("single",), **more) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    editor_tables = [f'[[editors]]\ntype = "{name}"\nnum_steps = 2' for name in editors]
    protocol_tables = [f'[[protocols]]\ntype = "{name}"' for name in protocols]
    (home / "run.toml").write_text(
        "\n".join(
            [
                'output_dir = "out"',
                *lines,
                '[cases]\nsource = "file"\npath = "vqa_eval.json"\nimage_root = "images"',
                '[[models]]\nid = "./model"\nname = "m"',
                *editor_tables,
                *protocol_tables,
            ]
        )
    )


def start(home: Path, capsys) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["run", str(home / "run.toml")])
    return code, capsys.readouterr().err


def results(home: Path) -> bytes:
    return (home / "out" / "results.jsonl").read_bytes()


def change_weights(home: Path) -> None:
    path = home / "model" / "model.safetensors"
    tensors = {name: tensor + 0.125 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def change_tokenizer(home: Path) -> None:
    path = home / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": 1}))


def change_image(home: Path) -> None:
    Image.new("RGB", (40, 32), (1, 2, 3)).save(home / "images" / "1.png")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_weights, "other weights of the model"),
        (change_tokenizer, "other config, tokenizer or processor of the model"),
        (change_image, "other images (unit 1, case 'vqa_eval/00001'"),
    ],
)
def test_a_finished_run_is_refused_when_what_it_is_made_of_changed(home, capsys, change, name):
    assert start(home, capsys)[0] == 0
    kept = results(home)
    saved = home / "saved"
    for folder in ("model", "images"):
        shutil.copytree(home / folder, saved / folder)
    change(home)
    code, error = start(home, capsys)
    assert code == 2
    assert f"m/finetune/single has results of {name}" in error
    assert results(home) == kept
    for folder in ("model", "images"):
        shutil.rmtree(home / folder)
        shutil.copytree(saved / folder, home / folder)
    assert start(home, capsys)[0] == 0
    assert results(home) == kept


def test_only_legs_that_depend_on_a_change_are_refused(home, capsys):
    assert start(home, capsys)[0] == 0
    kept = results(home)
    write_settings(home, editors=("finetune", "lora"))
    text = (home / "run.toml").read_text()
    (home / "run.toml").write_text(text.replace("num_steps = 2", "num_steps = 3", 1))
    code, error = start(home, capsys)
    assert code == 2
    assert "m/finetune/single" in error
    assert "m/lora/single" not in error.splitlines()[-1]
    assert results(home).startswith(kept)
    assert {row.editor for row in read_rows(home / "out")} == {"finetune", "lora"}


def test_trained_weights_of_an_editor_are_part_of_the_leg(tmp_path, monkeypatch, capsys):
    from errata.editors.common.checkpoint import WEIGHTS

    monkeypatch.chdir(tmp_path)
    shutil.copy(WEIGHTS / "mend-llava.safetensors", "trained.safetensors")
    Path("run.toml").write_text(
        'output_dir = "out"\ncases = {source = "world", num_cases = 1}\n'
        '[[models]]\nid = "micro/llava"\n'
        '[[editors]]\ntype = "mend"\npreset = "micro"\nweights = "trained.safetensors"\n'
    )
    assert start(tmp_path, capsys)[0] == 0
    shutil.copy(WEIGHTS / "mend-blip2.safetensors", "trained.safetensors")
    code, error = start(tmp_path, capsys)
    assert code == 2
    assert "other trained weights of the editor" in error


def test_a_run_folder_grows(home, capsys, monkeypatch):
    """Another editor, protocol and more cases need no new folder; finished legs are kept."""
    assert start(home, capsys)[0] == 0
    kept = results(home)
    write_settings(home, editors=("finetune", "lora"), protocols=("single", "sequential"))
    assert start(home, capsys)[0] == 0
    assert results(home).startswith(kept)
    legs = {(row.editor, row.protocol) for row in read_rows(home / "out")}
    assert legs == {(e, p) for e in ("finetune", "lora") for p in ("single", "sequential")}
    write_records(home, ["a red ball", "two dogs", "a chair"])
    kept = results(home)
    write_settings(home, editors=("finetune", "lora"))
    assert start(home, capsys)[0] == 0
    assert results(home).startswith(kept)
    rows = [row for row in read_rows(home / "out") if row.protocol == "single"]
    assert sorted((row.editor, row.case_number) for row in rows if row.probe == "reliability") == [
        (editor, number) for editor in ("finetune", "lora") for number in range(3)
    ]
    monkeypatch.setattr(runner, "open_model", lambda choice: pytest.fail("no model is needed"))
    write_records(home, ["a red ball", "two dogs"])  # fewer cases lose nothing
    assert start(home, capsys)[0] == 0


def test_a_corrected_record_redoes_only_its_case(home, capsys):
    assert start(home, capsys)[0] == 0
    kept = results(home)
    write_records(home, ["a red ball", "two red dogs"])
    code, error = start(home, capsys)
    assert code == 0
    assert "1 unit(s) of changed records again" in error
    new = results(home)
    assert new.startswith(kept)
    assert {json.loads(line)["case_number"] for line in new[len(kept) :].splitlines()} == {1}
    rows = read_rows(home / "out")
    targets = {row.case_number: row.target for row in rows if row.probe == "reliability"}
    assert targets == {0: "a red ball", 1: "two red dogs"}
    assert len(rows) == len(kept.splitlines())


def test_a_corrected_record_redoes_the_sequence_from_its_edit_on(home, capsys):
    write_records(home, ["a red ball", "two dogs", "a chair"])
    write_settings(home, protocols=("sequential",))
    assert start(home, capsys)[0] == 0
    kept = results(home)
    write_records(home, ["a red ball", "two dogs", "a red chair"])
    assert start(home, capsys)[0] == 0
    new = [json.loads(line) for line in results(home)[len(kept) :].splitlines()]
    assert {(one["case_number"], one["evaluated_at"]) for one in new} == {
        (2, "after_edit"),
        *((n, "end") for n in range(3)),
    }
    assert len(read_rows(home / "out")) == len(kept.splitlines())


def test_a_patch_version_changes_no_identity_a_minor_one_does(home, capsys, monkeypatch):
    from errata.bench.runs import identity

    assert start(home, capsys)[0] == 0
    major, minor, *_ = identity.__version__.split(".")
    monkeypatch.setattr(identity, "__version__", f"{major}.{minor}.99")
    assert start(home, capsys)[0] == 0
    monkeypatch.setattr(identity, "__version__", f"{major}.99.0")
    code, error = start(home, capsys)
    assert code == 2
    assert "other versions" in error


def test_threads_are_part_of_a_leg_and_a_resumed_run_takes_those_of_its_first_start(home, capsys):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert start(home, capsys)[0] == 0
        torch.set_num_threads(2)
        assert start(home, capsys)[0] == 0
        assert torch.get_num_threads() == 1
        write_settings(home, num_threads=2)
        code, error = start(home, capsys)
        assert code == 2
        assert "other number of threads (1 became 2)" in error
    finally:
        torch.set_num_threads(before)
