"""The algebra of deltas: exact where it says exact, refused with the reason where it is not."""

from __future__ import annotations

import msgspec
import pytest
import torch

from errata.bench.robustness.samples import sample
from errata.functional import (
    BaseModel,
    Delta,
    EditRecord,
    Header,
    compress,
    conflicts,
    diff,
    load_delta,
    merge,
    remove,
    save_delta,
    scale,
    select,
)
from errata.functional.deltas.stacking import stack
from errata.functional.deltas.weight_change import to_dense
from errata.functional.errors import BaseMismatchError, InvalidInputError, UnsupportedKindError
from errata.functional.kinds.common.algebra import entries_of
from errata.functional.kinds.schema import Dense, LowRank

WIDE, TALL = 7, 5


def low(
    number: int, names=("a.weight", "b.weight"), rank=2, dtype=torch.float32, **header
) -> Delta:
    generator = torch.Generator().manual_seed(number)
    entries = tuple(
        LowRank(name=n, checkpoint_name=n, shape=(TALL, WIDE), rank=rank, edit_ranks=(rank,))
        for n in names
    )
    tensors = {}
    for entry in entries:
        tensors[f"{entry.name}.A"] = torch.randn(rank, WIDE, generator=generator).to(dtype)
        tensors[f"{entry.name}.B"] = torch.randn(TALL, rank, generator=generator).to(dtype)
    known = Header(
        editor="x",
        base=BaseModel(id="a/model", parameter_hashes={n: f"{ord(n[0]):064x}" for n in names}),
        entries=entries,
        edits=(EditRecord(id=f"e{number}", prompt=f"{number:064x}", target=f"{number:064x}"),),
    )
    return Delta(msgspec.structs.replace(known, **header), tensors)


def dense(number: int) -> Delta:
    generator = torch.Generator().manual_seed(number)
    entry = Dense(name="a.weight", checkpoint_name="a.weight", shape=(TALL, WIDE))
    return Delta(
        Header(
            base=BaseModel(id="a/model"), entries=(entry,), edits=(EditRecord(id=f"d{number}"),)
        ),
        {"a.weight": torch.randn(TALL, WIDE, generator=generator)},
    )


def total(delta: Delta) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for part in entries_of(delta).values():
        out[part.entry.name] = out.get(part.entry.name, 0) + to_dense(part)
    return out


def equal(a: Delta, b: Delta) -> bool:
    return (
        a.header == b.header
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gone", [0, 17, 49])
def test_one_edit_removed_from_a_merge_of_50_is_the_merge_of_49(gone, dtype, tmp_path):
    some = [("a.weight",), ("a.weight", "b.weight"), ("b.weight", "c.weight")]
    deltas = [low(n, some[n % 3], rank=1 + n % 4, dtype=dtype) for n in range(50)]
    left = remove(merge(*deltas), [f"e{gone}"])
    want = merge(*deltas[:gone], *deltas[gone + 1 :])
    assert equal(left, want)
    assert save_delta(tmp_path / "left", left) == save_delta(tmp_path / "want", want)
    assert (tmp_path / "left").read_bytes() == (tmp_path / "want").read_bytes()


def test_the_only_edit_of_a_parameter_takes_the_parameter_with_it():
    merged = merge(low(0, ("a.weight",)), low(1, ("b.weight",)))
    left = remove(merged, [1])
    assert equal(left, merge(low(0, ("a.weight",))))
    assert set(left.header.base.parameter_hashes) == {"a.weight"}


def test_merging_adds_the_changes_and_is_associative_bit_for_bit():
    one, two, three = low(0), low(1, ("b.weight",)), low(2, rank=3)
    merged = total(merge(one, two, three))
    for name in merged:
        want = sum(total(delta).get(name, 0) for delta in (one, two, three))
        torch.testing.assert_close(merged[name], want)
    assert equal(merge(merge(one, two), three), merge(one, merge(two, three)))
    assert equal(merge(merge(one, two), three), merge(one, two, three))


def test_merging_dense_and_low_rank_keeps_both():
    merged = merge(dense(0), dense(1), low(2))
    assert [type(e).__name__ for e in merged.header.entries] == ["Dense", "LowRank", "LowRank"]
    want = total(dense(0))["a.weight"] + total(dense(1))["a.weight"] + total(low(2))["a.weight"]
    torch.testing.assert_close(total(merged)["a.weight"], want)


def test_scaling_acts_on_the_change():
    for delta in (low(0), dense(0)):
        for name, change in total(scale(delta, -0.5)).items():
            torch.testing.assert_close(change, -0.5 * total(delta)[name])


def test_select_keeps_the_order_and_the_rows():
    merged = merge(*(low(n) for n in range(5)))
    assert equal(select(merged, ["e3", 1]), merge(low(1), low(3)))
    assert equal(select(merged, range(5)), merged)
    assert select(merged, []).header.entries == ()


def test_stacked_edits_can_be_selected_whatever_their_kind():
    pile = stack([dense(n) for n in range(4)])
    two = select(pile, [2, "d0"])
    assert two.header.stack == 2
    assert [edit.id for edit in two.header.edits] == ["d0", "d2"]
    assert torch.equal(two.tensors["a.weight"][1], dense(2).tensors["a.weight"])


def test_what_can_not_be_taken_apart_is_refused_with_the_reason():
    with pytest.raises(UnsupportedKindError, match="sum of its 2 edits"):
        remove(merge(dense(0), dense(1)), [0])
    recursive = merge(low(0), low(1))
    recursive = Delta(
        msgspec.structs.replace(recursive.header, order_dependent=True), recursive.tensors
    )
    with pytest.raises(UnsupportedKindError, match="on top of those before"):
        remove(recursive, [0])
    with pytest.raises(UnsupportedKindError, match="on top of those before"):
        remove(merge(recursive, low(2)), [2])
    shared = compress(merge(low(0), low(1)), rank=2).delta
    with pytest.raises(UnsupportedKindError, match="shared by 2 edits"):
        remove(shared, ["e0"])
    with pytest.raises(InvalidInputError, match="'nobody'.*it has e0"):
        remove(low(0), ["nobody"])
    with pytest.raises(InvalidInputError, match="7 is none"):
        select(low(0), [7])


def test_edits_made_alone_by_a_recursive_method_can_be_taken_apart():
    one, two, three = (low(n, order_dependent=True) for n in range(3))
    both = merge(one, two, three)
    assert not both.header.order_dependent
    assert equal(remove(both, ["e1"]), merge(one, three))


@pytest.mark.parametrize(
    "whole", [low(0, order_dependent=True), dense(0), stack([dense(0), dense(1)])]
)
def test_without_any_of_its_edits_a_delta_changes_nothing(whole, tmp_path):
    nothing = remove(whole, range(len(whole.header.edits)))
    assert (nothing.header.entries, nothing.header.edits, nothing.tensors) == ((), (), {})
    save_delta(tmp_path / "x", nothing)
    assert load_delta(tmp_path / "x").header == nothing.header


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "2"])
def test_a_factor_must_be_a_finite_number(factor):
    with pytest.raises(InvalidInputError, match="finite number"):
        scale(low(0), factor)


def test_what_can_not_be_merged_is_refused_with_all_reasons():
    other = low(1, base=BaseModel(id="a/model", parameter_hashes={"a.weight": "f" * 64}))
    with pytest.raises(BaseMismatchError, match=r"a.weight has other values"):
        merge(low(0), other)
    with pytest.raises(BaseMismatchError, match="family"):
        merge(
            low(0, base=BaseModel(id="m", family="llava")),
            low(1, base=BaseModel(id="m", family="opt")),
        )
    with pytest.raises(InvalidInputError) as error:
        merge(low(0), low(1, dtype=torch.bfloat16, arithmetic="weight"))
    assert "dtypes differ" in str(error.value)
    assert "arithmetics differ (act, weight)" in str(error.value)
    with pytest.raises(InvalidInputError, match="stacked"):
        merge(stack([low(0), low(0)]), low(1))
    with pytest.raises(InvalidInputError, match="at least one"):
        merge()


def test_compressing_gives_the_nearest_change_and_reports_what_is_lost(tmp_path):
    merged = merge(*(low(n, ("a.weight",)) for n in range(3)))  # rank 6 in a 5 x 7 matrix
    change = total(merged)["a.weight"].double()
    singular = torch.linalg.svdvals(change)
    for rank in (1, 3, 5):
        small, lost = compress(merged, rank=rank)
        kept = total(small)["a.weight"].double()
        share = float(singular[rank:].square().sum() / singular.square().sum())
        assert lost["a.weight"] == pytest.approx(share, abs=1e-6)
        off = float((change - kept).square().sum() / change.square().sum())
        assert off == pytest.approx(share, abs=1e-6)  # Eckart-Young: no nearer one exists
        save_delta(tmp_path / "x", small)
        noted = load_delta(tmp_path / "x").header.settings["compressed"]["lost_energy"]["a.weight"]
        assert noted == lost["a.weight"]
    half, lost = compress(merged, energy=0.9)
    assert lost["a.weight"] <= 0.1
    assert half.header.entries[0].rank < 5


def test_a_dense_change_compresses_to_a_low_rank_one():
    small, lost = compress(dense(0), rank=TALL)
    assert isinstance(small.header.entries[0], LowRank)
    assert lost["a.weight"] == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(total(small)["a.weight"], total(dense(0))["a.weight"])
    for bad in ({}, {"rank": 0}, {"energy": 1.5}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(InvalidInputError, match="compress needs"):
            compress(dense(0), **bad)


def test_a_change_of_nothing_compresses_to_nothing():
    still = scale(low(0), 0.0)
    small, lost = compress(still, rank=1)
    assert lost == {"a.weight": 0.0, "b.weight": 0.0}
    assert not total(small)["a.weight"].any()


def test_diff_measures_without_multiplying_out():
    left, right = merge(low(0), low(1)), merge(low(0), dense(1))
    for item in diff(left, right):
        a = total(left).get(item.name, torch.zeros(TALL, WIDE))
        b = total(right).get(item.name, torch.zeros(TALL, WIDE))
        assert item.norm_a == pytest.approx(float(a.norm()), rel=1e-5)
        assert item.norm_b == pytest.approx(float(b.norm()), rel=1e-5)
        assert item.distance == pytest.approx(float((a - b).norm()), rel=1e-4)
    assert all(item.distance == 0 for item in diff(left, left))


def test_conflicts_finds_the_same_question_and_the_same_keys():
    asked = low(0)
    again = low(1, edits=(EditRecord(id="again", prompt=f"{0:064x}", target="f" * 64),))
    same = low(2, edits=(EditRecord(id="same", prompt=f"{0:064x}", target=f"{0:064x}"),))
    found = conflicts(asked, again, same, overlap=0.999)
    assert [(c.kind, c.ids) for c in found] == [
        ("contradiction", ("e0", "again")),
        ("duplicate", ("e0", "same")),
        ("contradiction", ("again", "same")),
    ]
    shifted = low(3)
    shifted.tensors["a.weight.A"][1] = -2 * low(0).tensors["a.weight.A"][0]
    clash = conflicts(low(0), shifted, overlap=0.999)
    assert [(c.kind, c.parameter, c.edit_a, c.edit_b) for c in clash] == [
        ("overlap", "a.weight", 0, 1)
    ]
    assert clash[0].score == pytest.approx(1)


def test_the_algebra_changes_none_of_its_arguments():
    deltas = [low(0), low(1), dense(2)]
    before = [{name: x.clone() for name, x in delta.tensors.items()} for delta in deltas]
    merged = merge(*deltas)
    scale(merged, 2.0), diff(merged, deltas[0]), conflicts(merged), compress(merged, rank=1)
    for old, delta in zip(before, deltas, strict=True):
        assert all(torch.equal(old[name], delta.tensors[name]) for name in old)


def test_any_sample_survives_merging_with_itself(tmp_path):
    for seed in range(6):
        delta = sample(seed)
        save_delta(tmp_path / "x", merge(delta, delta))
        assert len(load_delta(tmp_path / "x").header.edits) == 2 * len(delta.header.edits)
