"""Weights as pickles: only tensors are read, with a hint to convert; that keeps every value."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from errata.adapters import convert_checkpoint, from_pretrained, tiny_model
from errata.bench.cli.main import main
from errata.functional.errors import InvalidInputError


@pytest.fixture(params=["llama", "llava"])
def safe(request, tmp_path):
    module, processor = tiny_model(request.param)
    module.save_pretrained(tmp_path / "safe")
    processor.save_pretrained(tmp_path / "safe")
    return tmp_path / "safe"


def as_pickles(safe, folder, names, *, wrap=lambda state: state, **how):
    """The same checkpoint, its weights split over files of these names."""
    folder.mkdir()
    for path in safe.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    weights = list(load_file(safe / "model.safetensors").items())
    for number, name in enumerate(names):
        torch.save(wrap(dict(weights[number :: len(names)])), folder / name, **how)
    return weights


def same(one, two):
    assert one.params.keys() == two.params.keys()
    for name, tensor in one.params.items():
        assert torch.equal(tensor, two.params[name]), name


SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (["pytorch_model.bin"], {}),
        (["pytorch_model.bin"], {"_use_new_zipfile_serialization": False}),
        (SHARDS, {}),
        (["model.pt"], {"wrap": lambda state: {"state_dict": state, "step": 3}}),
        (["a.pth", "b.pth"], {}),
    ],
    ids=["bin", "before torch 1.6", "shards without an index", "pt", "two pth"],
)
def test_pickles_load_with_a_hint_and_convert_to_the_same_values(safe, tmp_path, names, how):
    folder = tmp_path / "pickles"
    as_pickles(safe, folder, names, **how)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    with pytest.warns(UserWarning, match="errata convert"):
        loaded = from_pretrained(folder)
    same(from_pretrained(safe), loaded)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("*.py"))
    same(loaded, from_pretrained(tmp_path / "out"))


def test_an_index_names_the_files(safe, tmp_path):
    folder = tmp_path / "pickles"
    weights = as_pickles(safe, folder, SHARDS)
    where = {name: SHARDS[number % 2] for number, (name, _) in enumerate(weights)}
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="errata convert"):
        same(from_pretrained(safe), from_pretrained(folder))
    (folder / SHARDS[1]).unlink()
    with pytest.raises(InvalidInputError, match="is named in the index and not there"):
        from_pretrained(folder)


class Runs:
    def __reduce__(self):
        return print, ("code of a pickle ran",)


@pytest.mark.filterwarnings("ignore:the weights of")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize(
    "state",
    [Runs(), {"a": Runs()}, [1, 2], {"a": "b"}],
    ids=["code", "code inside", "list", "text"],
)
def test_nothing_but_tensors_is_unpickled(safe, tmp_path, name, state, capsys):
    folder = tmp_path / "pickles"
    as_pickles(safe, folder, [])
    torch.save(state, folder / name)
    with pytest.raises(InvalidInputError):
        from_pretrained(folder)
    with pytest.raises(InvalidInputError, match="tensors"):
        convert_checkpoint(folder, tmp_path / "out")
    assert "ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:the weights of")
def test_a_damaged_pickle_is_named(safe, tmp_path):
    folder = tmp_path / "pickles"
    as_pickles(safe, folder, ["model.pt"])
    raw = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InvalidInputError, match=r"model\.pt"):
        from_pretrained(folder)


def test_a_folder_is_not_converted_into_itself_nor_twice(safe, tmp_path):
    with pytest.raises(InvalidInputError, match="safetensors already"):
        convert_checkpoint(safe, tmp_path / "out")
    folder = tmp_path / "pickles"
    as_pickles(safe, folder, ["model.pt"])
    with pytest.raises(InvalidInputError, match="outside the checkpoint"):
        convert_checkpoint(folder, folder / "out")


@pytest.mark.parametrize("name", ["org/nothing", "llava-hf/lava-1.5-7b-hf"])
def test_a_hub_id_that_is_not_there_is_said_so(name):
    with pytest.raises(InvalidInputError, match=r"not in the cache|is not on the hub"):
        from_pretrained(name)
