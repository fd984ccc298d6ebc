from __future__ import annotations

from typing import NamedTuple

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from errata import adapters
from errata.bench.storage.checkpoint import (
    CheckpointFile,
    SequenceCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from errata.editors import make_editor
from errata.editors.common.gradient_descent import DescentState
from errata.functional import BaseModel, Delta, EditRecord, Header, Query
from errata.functional.kinds.schema import Dense
from tests.editors.methods import CASES

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


class Deep(NamedTuple):
    states: list[DescentState]
    plain: tuple[int, float, bool, None]
    tensors: dict[int, torch.Tensor]
    pair: tuple[EditRecord, DescentState] | None = None


def test_a_state_comes_back_bit_for_bit(tmp_path):
    wanted = Deep(
        [state()], (1, 0.1, True, None), {3: torch.zeros(0, 4)}, (EditRecord(id="c"), state())
    )
    save_checkpoint(tmp_path / "m", "run/0", SequenceCheckpoint(7, wanted, delta()))
    fresh = Deep([], (0, 0.0, False, None), {})
    edits, got, change = load_checkpoint(tmp_path / "m", "run/0", fresh, CPU)
    assert edits == 7
    assert change.header == delta().header
    assert torch.equal(change.tensors["w"], delta().tensors["w"])
    assert got.plain == (1, 0.1, True, None)
    assert got.tensors[3].shape == (0, 4)
    assert got.pair[0] == EditRecord(id="c")
    for mine, theirs in [(got.states[0], wanted.states[0]), (got.pair[1], wanted.pair[1])]:
        assert type(mine) is DescentState
        assert mine.edits == theirs.edits
        assert list(mine.tensors) == ["w", "v"]
        for name, tensor in theirs.tensors.items():
            assert torch.equal(mine.tensors[name], tensor)
            assert mine.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("name", CASES)
def test_the_state_of_every_method_resumes_to_the_same_bits(name, tmp_path):
    """After two edits; a state that cannot be written would be made again in silence."""
    model = adapters.from_module(*adapters.tiny_model("llava"))
    editor = make_editor(CASES[name])
    begin = editor.init(model, torch.Generator().manual_seed(0))
    queries = [Query(f"who is number {k}?", target) for k, target in enumerate(("bo", "al", "jo"))]
    held, change = begin, None
    for query in queries[:2]:
        change, held = editor.edit(model, held, [query])
    save_checkpoint(tmp_path / "m", "run/0", SequenceCheckpoint(2, held, change))
    assert b"errata.editors" not in (tmp_path / "m").read_bytes()
    again = load_checkpoint(tmp_path / "m", "run/0", begin, CPU)
    assert again is not None
    assert again.delta.header == change.header
    wanted, _ = editor.edit(model, held, queries[2:])
    got, _ = editor.edit(model, again.state, queries[2:])
    assert got.header == wanted.header
    assert all(torch.equal(got.tensors[key], x) for key, x in wanted.tensors.items())


def test_a_mark_of_another_run_is_none(tmp_path):
    save_checkpoint(tmp_path / "m", "run/0", SequenceCheckpoint(1, state(), delta()))
    assert load_checkpoint(tmp_path / "m", "run/1", state(), CPU) is None
    assert load_checkpoint(tmp_path / "none", "run/0", state(), CPU) is None


def test_a_broken_file_is_none(tmp_path):
    path = tmp_path / "m"
    save_checkpoint(path, "run/0", SequenceCheckpoint(1, state(), delta()))
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert load_checkpoint(path, "run/0", state(), CPU) is None


def test_a_file_names_no_class(tmp_path):
    """What a file asks for is ignored: classes come from the fresh state alone."""
    for tree in (
        {"named": "os:system", "items": [{"plain": "ls"}]},
        {"fields": {"tensors": {"plain": 1}, "popen": {"plain": "ls"}}},
        {"struct": {"id": "a"}},
        {"plain": "x", "more": 1},
    ):
        plan = {"identity": "run/0", "num_edits": 1, "state": tree}
        plan |= {"header": msgspec.to_builtins(delta().header), "tensors": {"dict": []}}
        save_file({}, tmp_path / "m", {"errata.checkpoint": msgspec.json.encode(plan).decode()})
        got = load_checkpoint(tmp_path / "m", "run/0", state(), CPU)
        assert got is None or got.state == "x"


def test_what_can_not_be_written_is_made_again(tmp_path):
    unnamed = {"no annotation names its class": state()}
    for held in (torch.Generator(), {(1, 2): 3}, float("nan"), object(), unnamed):
        with pytest.raises(TypeError, match="may not hold"):
            save_checkpoint(tmp_path / "m", "run/0", SequenceCheckpoint(1, held, delta()))
        CheckpointFile(tmp_path / "m", "run", every=0).save(0, SequenceCheckpoint(1, held, delta()))
    assert not (tmp_path / "m").exists()


def test_marks_are_made_now_and_then(tmp_path):
    marks = CheckpointFile(tmp_path / "m", "run", every=3600)
    marks.save(0, SequenceCheckpoint(1, state(), delta()))
    assert marks.load(0, state(), CPU) is None
    marks = CheckpointFile(tmp_path / "m", "run", every=0)
    marks.save(5, SequenceCheckpoint(2, state(), delta()))
    assert marks.load(5, state(), CPU).num_edits == 2
    assert marks.load(0, state(), CPU) is None
    marks.delete()
    assert marks.load(5, state(), CPU) is None
