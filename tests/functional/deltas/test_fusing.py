"""A folded checkpoint is the base with exactly the delta's parameters changed, or is not there."""

from __future__ import annotations

import errno
import json
import os
import resource

import msgspec
import pytest
import safetensors.torch
import torch

from errata.adapters.zoo.tiny import tiny_model
from errata.functional import BaseModel, Delta, EditRecord, Header, bind, merge
from errata.functional.deltas.fusing import fuse
from errata.functional.deltas.stacking import stack
from errata.functional.errors import (
    BaseMismatchError,
    DeltaFileError,
    InvalidInputError,
    UnknownSiteError,
    UnsupportedKindError,
)
from errata.functional.kinds.schema import Dense, LowRank
from tests.adapters.zoo_of_families.deltas import case, lowrank

NAMES = ("a.weight", "b.weight", "c.bias")


@pytest.fixture
def base(tmp_path):
    """A checkpoint of two shards beside what a folder from the hub has."""
    folder = tmp_path / "base"
    folder.mkdir()
    one = {"a.weight": torch.randn(6, 4), "z": torch.arange(3)}
    two = {"b.weight": torch.randn(5, 4).bfloat16(), "c.bias": torch.randn(5)}
    safetensors.torch.save_file(one, folder / "model-1.safetensors", {"format": "pt"})
    safetensors.torch.save_file(two, folder / "model-2.safetensors", {"format": "pt"})
    where = dict.fromkeys(one, "model-1.safetensors") | dict.fromkeys(two, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    return folder


def delta_for(folder) -> Delta:
    entries = (
        LowRank(
            name="m.a.weight", checkpoint_name="a.weight", shape=(6, 4), rank=2, edit_ranks=(2,)
        ),
        LowRank(
            name="m.b.weight", checkpoint_name="b.weight", shape=(5, 4), rank=1, edit_ranks=(1,)
        ),
        Dense(name="m.c.bias", checkpoint_name="c.bias", shape=(5,)),
    )
    header = Header(
        base=BaseModel(id="m", family="llama"),
        arithmetic="weight",
        entries=entries,
        edits=(EditRecord(id="0"),),
    )
    tensors = {name: torch.randn(shape) for name, (_, shape) in header.tensor_specs().items()}
    return Delta(header, tensors)


def everything(folder) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(shard)
    return found


def test_only_what_the_delta_names_changes(base, tmp_path):
    delta = delta_for(base)
    fuse(delta, base, tmp_path / "out")
    old, new = everything(base), everything(tmp_path / "out")
    a = delta.tensors["m.a.weight.B"] @ delta.tensors["m.a.weight.A"]
    b = delta.tensors["m.b.weight.B"] @ delta.tensors["m.b.weight.A"]
    assert torch.equal(new["a.weight"], old["a.weight"] + a)
    assert torch.equal(new["b.weight"], old["b.weight"] + b.bfloat16())
    assert torch.equal(new["c.bias"], old["c.bias"] + delta.tensors["m.c.bias"])
    assert torch.equal(new["z"], old["z"])
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "errata.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    for shard in ("model-1.safetensors", "model-2.safetensors"):  # same headers, same layout
        before, after = (base / shard).read_bytes(), (tmp_path / "out" / shard).read_bytes()
        size = 8 + int.from_bytes(before[:8], "little")
        assert before[:size] == after[:size]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_a_folded_model_is_the_bound_one(name, tmp_path):
    module, model, inputs, _ = case(name)
    module.save_pretrained(tmp_path / "base")
    delta = merge(
        lowrank(model, "weight", seed=1, id="a"), lowrank(model, "weight", seed=2, id="b")
    )
    fuse(delta, tmp_path / "base", tmp_path / "out")
    again = type(module).from_pretrained(tmp_path / "out").eval()
    edited = bind(model, delta)
    for entry in delta.header.entries:
        assert torch.equal(dict(again.named_parameters())[entry.name], edited.params[entry.name])
    assert len(dict(again.named_parameters())) == len(dict(module.named_parameters()))


def test_the_base_is_recognised_by_its_values_in_any_dtype(tmp_path):
    module, _ = tiny_model("llama", num_layers=1)
    _, model, _, _ = case("llama")
    module.save_pretrained(tmp_path / "other")
    case("llama").module.save_pretrained(tmp_path / "base")
    delta = lowrank(model, "weight")
    fuse(delta, tmp_path / "base", tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    wide = {name: x.double() for name, x in tensors.items()}
    safetensors.torch.save_file(wide, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    fuse(delta, tmp_path / "base", tmp_path / "wide")
    one = lowrank(model, "weight", paths=["model.layers.0.mlp.down_proj"])
    with pytest.raises(BaseMismatchError, match="other values"):
        fuse(one, tmp_path / "other", tmp_path / "no")
    fuse(one, tmp_path / "other", tmp_path / "forced", check=False)
    assert not (tmp_path / "no").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(base, tmp_path):
    delta = delta_for(base)

    def with_entry(**change):
        entries = (msgspec.structs.replace(delta.header.entries[0], **change),)
        tensors = {k: x for k, x in delta.tensors.items() if k.startswith("m.a.")}
        return Delta(msgspec.structs.replace(delta.header, entries=entries), tensors)

    with pytest.raises(UnknownSiteError, match="has no 'q.weight'"):
        fuse(with_entry(checkpoint_name="q.weight"), base, tmp_path / "out")
    with pytest.raises(UnknownSiteError, match=r"shape \[6, 4\], not \[4, 6\]"):
        fuse(with_entry(shape=(4, 6)), base, tmp_path / "out")
    with pytest.raises(UnknownSiteError, match="stored as I64"):
        fuse(with_entry(checkpoint_name="z", shape=(3,)), base, tmp_path / "out")
    alien = Delta(
        msgspec.structs.replace(delta.header, base=BaseModel(id="m", family="llava")), delta.tensors
    )
    with pytest.raises(UnknownSiteError, match="family 'llama', not 'llava'"):
        fuse(alien, base, tmp_path / "out")
    with pytest.raises(UnsupportedKindError, match="stacked"):
        fuse(stack([delta, delta]), base, tmp_path / "out")
    with pytest.raises(InvalidInputError, match="outside"):
        fuse(delta, base, base / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InvalidInputError, match="must not exist yet"):
        fuse(delta, base, tmp_path / "full")
    assert sorted(os.listdir(tmp_path)) == ["base", "full"]
    assert os.listdir(tmp_path / "full") == ["mine"]


@pytest.mark.parametrize("shard", ["../../etc/passwd", "sub/model.safetensors", "model.bin", "x"])
def test_an_index_that_points_elsewhere_is_refused(base, tmp_path, shard):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(DeltaFileError, match="no safetensors file in the"):
        fuse(delta_for(base), base, tmp_path / "out")


def test_pickled_checkpoints_are_not_read(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pytest_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidInputError, match="pickles never"):
        fuse(delta_for(tmp_path), tmp_path / "base", tmp_path / "out")


def test_full_disk_leaves_nothing_behind(base, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128, limits[1]))
    try:
        with pytest.raises(InvalidInputError, match=os.strerror(errno.EFBIG)):
            fuse(delta_for(base), base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == ["base"]
