from __future__ import annotations

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from errata.bench.storage.checkpoint import (
    CheckpointFile,
    SequenceCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from errata.editors.common.gradient_descent import DescentState
from errata.functional import BaseModel, Delta, EditRecord, Header
from errata.functional.kinds.schema import Dense

CPU = torch.device("cpu")


def delta() -> Delta:
    entry = Dense(name="w", checkpoint_name="w", shape=(2,))
    header = Header(
        base=BaseModel(id="me/tiny"), entries=(entry,), settings={"lr": 0.1, "clamp": None}
    )
    return Delta(header, {"w": torch.tensor([1.5, -2.0])})


def state() -> DescentState:
    tensors = {"w": torch.randn(3, 2)[:, 1], "v": torch.tensor(2, dtype=torch.bfloat16)}
    return DescentState(tensors, (EditRecord(id="a"), EditRecord(id="b", images=("x",))))


def test_a_state_comes_back_bit_for_bit(tmp_path):
    wanted = {"of": [state(), (1, 0.1, True, None)], "deep": {3: torch.zeros(0, 4)}}
    save_checkpoint(tmp_path / "m", "run/0", SequenceCheckpoint(7, wanted, delta()))
    edits, got, change = load_checkpoint(tmp_path / "m", "run/0", CPU)
    assert edits == 7
    assert change.header == delta().header
    assert torch.equal(change.tensors["w"], delta().tensors["w"])
    assert type(got["of"][0]) is DescentState
    assert got["of"][0].edits == wanted["of"][0].edits
    assert got["of"][1] == (1, 0.1, True, None)
    for name, tensor in wanted["of"][0].tensors.items():
        assert torch.equal(got["of"][0].tensors[name], tensor)
        assert got["of"][0].tensors[name].dtype == tensor.dtype
    assert list(got["of"][0].tensors) == ["w", "v"]
    assert got["deep"][3].shape == (0, 4)


def test_a_mark_of_another_run_is_none(tmp_path):
    save_checkpoint(tmp_path / "m", "run/0", SequenceCheckpoint(1, state(), delta()))
    assert load_checkpoint(tmp_path / "m", "run/1", CPU) is None
    assert load_checkpoint(tmp_path / "none", "run/0", CPU) is None


def test_a_broken_file_is_none(tmp_path):
    path = tmp_path / "m"
    save_checkpoint(path, "run/0", SequenceCheckpoint(1, state(), delta()))
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert load_checkpoint(path, "run/0", CPU) is None


def test_no_class_but_ours_is_looked_up(tmp_path):
    for name in (
        "os:system",
        "errata.functional.deltas.serialization:save",
        "errata.bench.cli.main:main",
        "subprocess:Popen",
    ):
        tree = {"tuple": [{"named": name, "items": [{"plain": "ls"}]}, {"plain": 1}]}
        plan = msgspec.json.encode({"about": "run/0", "edits": 1, "tree": tree}).decode()
        save_file({}, tmp_path / "m", {"errata.checkpoint": plan})
        assert load_checkpoint(tmp_path / "m", "run/0", CPU) is None


def test_what_can_not_be_written_is_made_again(tmp_path):
    for held in (torch.Generator(), {(1, 2): 3}, float("nan"), object()):
        with pytest.raises(TypeError, match="may not hold"):
            save_checkpoint(tmp_path / "m", "run/0", SequenceCheckpoint(1, held, delta()))
        CheckpointFile(tmp_path / "m", "run", every=0).save(0, SequenceCheckpoint(1, held, delta()))
    assert not (tmp_path / "m").exists()


def test_marks_are_made_now_and_then(tmp_path):
    marks = CheckpointFile(tmp_path / "m", "run", every=3600)
    marks.save(0, SequenceCheckpoint(1, state(), delta()))
    assert marks.load(0, CPU) is None
    marks = CheckpointFile(tmp_path / "m", "run", every=0)
    marks.save(5, SequenceCheckpoint(2, state(), delta()))
    assert marks.load(5, CPU).num_edits == 2
    assert marks.load(0, CPU) is None
    marks.delete()
    assert marks.load(5, CPU) is None
