"""Stacks of deltas: in, out, and the averages over rows."""

import msgspec
import pytest
import torch

from errata.functional import BaseModel, Delta, EditRecord, Header
from errata.functional.deltas import stacking
from errata.functional.errors import ShapeError, UnsupportedKindError
from errata.functional.forward import batches
from errata.functional.kinds.schema import Dense, LowRank


def delta(number, *, shape=(4, 3), rank=2, **header):
    entries = (
        Dense(name="b.weight", checkpoint_name="b.weight", shape=shape),
        LowRank(
            name="a.weight", checkpoint_name="a.weight", shape=shape, rank=rank, edit_ranks=(rank,)
        ),
    )
    generator = torch.Generator().manual_seed(number)
    tensors = {
        "b.weight": torch.randn(shape, generator=generator),
        "a.weight.A": torch.randn(rank, shape[1], generator=generator),
        "a.weight.B": torch.randn(shape[0], rank, generator=generator),
    }
    settings = {
        "editor": "test",
        "base": BaseModel(id="a/model"),
        "edits": (EditRecord(id=str(number)),),
    }
    return Delta(Header(entries=entries, **{**settings, **header}), tensors)


def test_unstack_undoes_stack():
    many = [delta(n) for n in range(3)]
    stacked = stacking.stack(many)
    assert stacked.header.stack == 3
    assert {n: (3, *t.shape) for n, t in many[0].tensors.items()} == {
        n: tuple(t.shape) for n, t in stacked.tensors.items()
    }
    for one, back in zip(many, stacking.unstack(stacked), strict=True):
        assert back.header == one.header
        assert all(torch.equal(back.tensors[n], one.tensors[n]) for n in one.tensors)


def test_take_chooses_edits_in_any_order():
    stacked = stacking.stack([delta(n) for n in range(4)])
    some = stacking.select_edits(stacked, [3, 1])
    assert [edit.id for edit in some.header.edits] == ["3", "1"]
    assert some.header.stack == 2
    for name, tensor in some.tensors.items():
        assert torch.equal(tensor, stacked.tensors[name][[3, 1]])


def test_every_difference_in_layout_is_named():
    other = delta(1, shape=(5, 3), base=BaseModel(id="b/model"))
    bare = delta(2)
    bare.tensors["b.weight"] = torch.zeros(1)
    with pytest.raises(
        ShapeError, match="delta 1 has another base; delta 1 has other entries; delta 2 .*shapes"
    ):
        stacking.stack([delta(0), other, bare])
    with pytest.raises(ShapeError, match="stacked already"):
        stacking.stack([delta(0), stacking.stack([delta(1)])])
    with pytest.raises(ShapeError, match="got none"):
        stacking.stack([])


def test_only_stacks_come_apart():
    for run in (stacking.unstack, lambda d: stacking.select_edits(d, [0])):
        with pytest.raises(UnsupportedKindError, match="not"):
            run(delta(0))


def test_shared_rank_stays_shared_for_edits_that_depend_on_one_another():
    header = msgspec.structs.replace(stacking.stack([delta(0)]).header, order_dependent=True)
    alone = stacking.unstack(Delta(header, stacking.stack([delta(0)]).tensors))[0]
    assert alone.header.entries[1].edit_ranks == ()


def test_per_edit_is_the_mean_over_rows_and_differentiable():
    values = torch.tensor([1.0, 3.0, 5.0, 7.0], requires_grad=True)
    edit = torch.tensor([2, 0, 2, -1])
    got = batches.mean_per_edit(values, edit, 3)
    assert got.tolist() == [3.0, 0.0, 3.0]
    assert torch.autograd.grad(got.sum(), values)[0].tolist() == [0.5, 1.0, 0.5, 0.0]


def test_spread_puts_every_row_under_every_edit(toy, queries):
    batch = toy.embed(toy.params, toy.preprocess(queries[:2]))
    many = batches.repeat_per_edit(batch, 3)
    assert many.edit_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(many.hidden_states, batch.hidden_states.repeat(3, 1, 1))
