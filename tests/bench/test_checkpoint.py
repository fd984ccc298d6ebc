from __future__ import annotations

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from errata.bench.checkpoint import Mark, Marks, keep, recall
from errata.editors.descent import Trained
from errata.functional import Base, Delta, Dense, EditRecord, Header

CPU = torch.device("cpu")


def delta() -> Delta:
    entry = Dense(name="w", checkpoint="w", shape=(2,))
    header = Header(base=Base(id="me/tiny"), entries=(entry,), settings={"lr": 0.1, "clamp": None})
    return Delta(header, {"w": torch.tensor([1.5, -2.0])})


def state() -> Trained:
    tensors = {"w": torch.randn(3, 2)[:, 1], "v": torch.tensor(2, dtype=torch.bfloat16)}
    return Trained(tensors, (EditRecord(id="a"), EditRecord(id="b", images=("x",))))


def test_a_state_comes_back_bit_for_bit(tmp_path):
    wanted = {"of": [state(), (1, 0.1, True, None)], "deep": {3: torch.zeros(0, 4)}}
    keep(tmp_path / "m", "run/0", Mark(7, wanted, delta()))
    edits, got, change = recall(tmp_path / "m", "run/0", CPU)
    assert edits == 7
    assert change.header == delta().header
    assert torch.equal(change.tensors["w"], delta().tensors["w"])
    assert type(got["of"][0]) is Trained
    assert got["of"][0].edits == wanted["of"][0].edits
    assert got["of"][1] == (1, 0.1, True, None)
    for name, tensor in wanted["of"][0].tensors.items():
        assert torch.equal(got["of"][0].tensors[name], tensor)
        assert got["of"][0].tensors[name].dtype == tensor.dtype
    assert list(got["of"][0].tensors) == ["w", "v"]
    assert got["deep"][3].shape == (0, 4)


def test_a_mark_of_another_run_is_none(tmp_path):
    keep(tmp_path / "m", "run/0", Mark(1, state(), delta()))
    assert recall(tmp_path / "m", "run/1", CPU) is None
    assert recall(tmp_path / "none", "run/0", CPU) is None


def test_a_broken_file_is_none(tmp_path):
    path = tmp_path / "m"
    keep(path, "run/0", Mark(1, state(), delta()))
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert recall(path, "run/0", CPU) is None


def test_no_class_but_ours_is_looked_up(tmp_path):
    for name in (
        "os:system",
        "errata.functional.io:save",
        "errata.bench.cli:main",
        "subprocess:Popen",
    ):
        tree = {"tuple": [{"named": name, "items": [{"plain": "ls"}]}, {"plain": 1}]}
        plan = msgspec.json.encode({"about": "run/0", "edits": 1, "tree": tree}).decode()
        save_file({}, tmp_path / "m", {"errata.checkpoint": plan})
        assert recall(tmp_path / "m", "run/0", CPU) is None


def test_what_can_not_be_written_is_made_again(tmp_path):
    for held in (torch.Generator(), {(1, 2): 3}, float("nan"), object()):
        with pytest.raises(TypeError, match="may not hold"):
            keep(tmp_path / "m", "run/0", Mark(1, held, delta()))
        Marks(tmp_path / "m", "run", every=0).keep(0, Mark(1, held, delta()))
    assert not (tmp_path / "m").exists()


def test_marks_are_made_now_and_then(tmp_path):
    marks = Marks(tmp_path / "m", "run", every=3600)
    marks.keep(0, Mark(1, state(), delta()))
    assert marks.recall(0, CPU) is None
    marks = Marks(tmp_path / "m", "run", every=0)
    marks.keep(5, Mark(2, state(), delta()))
    assert marks.recall(5, CPU).edits == 2
    assert marks.recall(0, CPU) is None
    marks.drop()
    assert marks.recall(5, CPU) is None
