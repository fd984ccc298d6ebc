"""The delta verbs of `errata`, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from errata.adapters import load_micro
from errata.adapters.zoo.micro import micro_names
from errata.bench.cli.main import main
from errata.bench.robustness.crash_writes import make_checkpoint, make_delta
from errata.bench.robustness.samples import sample
from errata.functional import BaseModel, Delta, Header, load_delta, merge, save_delta, scale
from errata.functional.deltas.inspection import METADATA_KEY, encode_header, inspect_delta
from errata.functional.deltas.safetensors_header import build_header
from errata.functional.deltas.serialization import digest
from errata.functional.kinds.schema import Dense
from tests.adapters.zoo_of_families.deltas import lowrank

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(capsys):
    def call(*words) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def files(tmp_path):
    """Deltas 0 and 1, and the checkpoint they fit."""
    make_checkpoint(tmp_path / "base")
    for number in range(2):
        save_delta(tmp_path / f"{number}.safetensors", make_delta(number))
    return tmp_path


def test_show_says_what_changes_for_which_edits(run, files):
    code, out, _ = run("inspect", files / "0.safetensors")
    assert code == 0
    for words in (
        "someone/model",
        "changes 4 parameter(s)",
        "model.layers.2.mlp.down_proj.weight  256 x 768  lowrank of rank 64, F32, 262.1 kB",
        "1 edit(s)\n",
        digest(make_delta(0))[:16],
    ):
        assert words in out


def test_show_json_has_all_of_it_and_norms_on_demand(run, files):
    facts = json.loads(run("inspect", files / "0.safetensors", "--json")[1])
    assert facts["digest"] == inspect_delta(files / "0.safetensors").digest
    assert [entry["norm"] for entry in facts["entries"]] == [None] * 4
    assert facts["edits"][0]["ranks"]["model.layers.0.mlp.down_proj.weight"] == 64
    facts = json.loads(run("inspect", files / "0.safetensors", "--json", "--norms")[1])
    delta = make_delta(0)
    for entry in facts["entries"]:
        change = delta.tensors[entry["parameter"] + ".B"] @ delta.tensors[entry["parameter"] + ".A"]
        assert entry["norm"] == pytest.approx(float(change.norm()), rel=1e-5)


def test_merge_remove_and_diff(run, files):
    both, left = files / "both.safetensors", files / "left.safetensors"
    assert run("merge", files / "0.safetensors", files / "1.safetensors", "-o", both)[0] == 0
    assert digest(load_delta(both)) == digest(merge(make_delta(0), make_delta(1)))
    assert run("remove", both, "0", "-o", left)[0] == 0
    assert left.read_bytes() == (files / "1.safetensors").read_bytes()
    assert run("remove", both, "#1", "-o", left)[0] == 0
    assert left.read_bytes() == (files / "0.safetensors").read_bytes()
    assert "the same change" in run("diff", left, files / "0.safetensors")[1]
    facts = json.loads(run("diff", both, files / "0.safetensors", "--json")[1])
    assert {item["name"] for item in facts["parameters"]} == {
        entry.name for entry in make_delta(0).header.entries
    }
    assert any(item["kind"] == "overlap" for item in facts["conflicts"])


def test_check_reads_headers_and_with_values_everything(run, files):
    path, base = files / "0.safetensors", files / "base"
    code, out, _ = run("verify", path, "--base", base)
    assert code == 0
    assert "values not read" in out
    assert "digest correct" in run("verify", path, "--base", base, "--values")[1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 64
    path.write_bytes(raw)
    assert run("verify", path)[0] == 0
    code, _, err = run("verify", path, "--values")
    assert code == 2
    assert "does not match its digest" in err


def test_check_refuses_another_base(run, files):
    header = make_delta(0).header
    touched = {header.entries[0].name: "0" * 64}
    other = msgspec.structs.replace(
        header, base=msgspec.structs.replace(header.base, parameter_hashes=touched)
    )
    save_delta(files / "x", Delta(other, make_delta(0).tensors))
    assert run("verify", files / "x", "--base", files / "base")[0] == 0
    code, _, err = run("verify", files / "x", "--base", files / "base", "--values")
    assert code == 2
    assert "has other values in" in err
    save_delta(files / "y", sample(0))
    code, _, err = run("verify", files / "y", "--base", files / "base")
    assert code == 2
    assert "the checkpoint has no" in err


def test_export_and_import_go_there_and_back(run, files):
    folder, back = files / "adapter", files / "back.safetensors"
    assert run("export", files / "0.safetensors", "-o", folder)[0] == 0
    assert run("import", folder, "-o", back)[0] == 0
    assert back.read_bytes() == (files / "0.safetensors").read_bytes()
    code, out, _ = run("export", files / "0.safetensors", "-o", files / "small", "--rank", "8")
    assert code == 0
    assert "of its energy lost" in out
    code, out, _ = run(
        "export",
        files / "0.safetensors",
        "-o",
        files / "s",
        "--profile",
        "serving",
        "--base",
        files / "base",
    )
    assert code == 0
    assert "rounding" in out
    assert run("export", files / "0.safetensors", "-o", folder)[0] == 2


def test_fold_writes_a_checkpoint(run, files):
    assert (
        run("fuse", files / "0.safetensors", "--base", files / "base", "-o", files / "new")[0] == 0
    )
    assert (files / "new" / "model.safetensors.index.json").exists()
    code, _, err = run(
        "fuse", files / "0.safetensors", "--base", files / "nowhere", "-o", files / "n"
    )
    assert code == 2
    assert "must be a folder with a checkpoint" in err


def test_generate_compares_base_and_edited(run, tmp_path):
    name = micro_names()[0]
    model = load_micro(name)
    path = model.card.resolve_linear("layers.-1.mlp.down")
    save_delta(tmp_path / "x", scale(lowrank(model, paths=[path], rank=4), 20.0))
    code, out, _ = run(
        "generate",
        "--delta",
        tmp_path / "x",
        "--model",
        f"micro/{name}",
        "--prompt",
        "what is it?",
        "--compare-base",
    )
    assert code == 0
    base, _, edited = out.removeprefix("base:").partition("\nedited:")
    assert base.strip()
    assert base.strip() != edited.strip()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["inspect", "nowhere"], "nowhere cannot be read: No such file"),
        (["inspect", "."], "must be a file, and is a folder"),
        (["remove", "0.safetensors", "#x", "-o", "y"], "by # and its number"),
        (["remove", "0.safetensors", "nobody", "-o", "y"], "'nobody' is none"),
        (["remove", "0.safetensors", "", "-o", "y"], "'' is none"),
        (["merge", "0.safetensors", "pickle", "-o", "y"], "pickle: "),
        (["import", "base", "-o", "y"], "adapter_config.json"),
        (["fuse", "0.safetensors", "--base", "base", "-o", "base"], "must lie outside"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, files, monkeypatch, words, reason):
    monkeypatch.chdir(files)
    (files / "pickle").write_bytes(b"\x80\x04cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")
    before = sorted(path.name for path in files.iterdir())
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in files.iterdir()) == before


def test_show_and_check_need_no_torch_and_little_memory(files):
    code = (
        "import re, sys; from errata.bench.cli.main import main; "
        "assert main(sys.argv[1:]) == 0; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()); "
        "assert int(peak[1]) < 100_000, peak"
    )
    for verb in ("inspect", "verify"):
        words = [verb, str(files / "0.safetensors")]
        subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=ROOT)


def test_a_gigabyte_is_looked_at_by_its_header(run, tmp_path):
    """A sparse file: only its first kilobytes are there to be read."""
    size = 1 << 30
    entry = Dense(name="w", checkpoint_name="w", shape=(size // 4,))
    text = encode_header(Header(base=BaseModel(id="m"), entries=(entry,)), "0" * 64)
    head, _ = build_header({METADATA_KEY: text}, {"w": ("F32", entry.shape)})
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    assert path.stat().st_blocks * 512 < 1 << 20
    assert "1.1 GB" in run("inspect", path)[1]
    assert run("verify", path)[0] == 0
    assert path.stat().st_blocks * 512 < 1 << 20
