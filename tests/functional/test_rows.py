"""Cutting, padding and joining batches follows the layout in the keys of extras."""

import pytest
import torch

from errata.functional import IGNORE, Batch
from errata.functional.errors import ShapeMismatch
from errata.functional.rows import concat, earlier, later, pad, pick, take, trim


def batch(rows=2, length=5, scored=2, past=0, seed=0, added=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, -1] = False
    causal = torch.ones(length, length + past, dtype=torch.bool).tril(past)
    keys = torch.cat([torch.ones(rows, past, dtype=torch.bool), mask], 1)
    extras = {
        "mask@b_qk": causal[None, None] & keys[:, None, None],
        "bias@b_qk": torch.randn(rows, 1, length, length + past, generator=generator),
        "cos@bq_": torch.randn(rows, length, 4, generator=generator),
        "axes@b_q_": torch.randn(rows, 3, length, 4, generator=generator),
        "fixed@b_": torch.randn(rows, 6, generator=generator),
    }
    if added:
        extras["added.0@bq_"] = torch.randn(rows, length, 3, generator=generator)
    at = torch.arange(scored).expand(rows, scored) + length - scored - 1
    return Batch(
        hidden=torch.randn(rows, length, 3, generator=generator),
        mask=mask,
        positions=torch.arange(length).expand(rows, 1, length),
        image=torch.zeros(rows, length, dtype=torch.bool),
        prompt=torch.arange(length).expand(rows, length) == at[:, :1],
        labels=torch.randint(0, 9, (rows, scored), generator=generator),
        at=at,
        edit=torch.arange(rows),
        extras=extras,
        depth=1,
    )


def test_take_gathers_rows_of_everything():
    whole = batch(3)
    few = take(whole, torch.tensor([2, 0]))
    assert torch.equal(few.hidden, whole.hidden[[2, 0]])
    assert torch.equal(few.edit, torch.tensor([2, 0]))
    assert all(torch.equal(few.extras[key], whole.extras[key][[2, 0]]) for key in whole.extras)
    assert few.depth == 1
    assert take(whole, slice(1, 2)).rows == 1


def test_a_cut_in_time_splits_queries_and_shares_keys():
    whole = batch()
    first, rest = earlier(whole, 2), later(whole, 2)
    assert torch.equal(torch.cat([first.hidden, rest.hidden], 1), whole.hidden)
    assert torch.equal(torch.cat([first.positions, rest.positions], 2), whole.positions)
    assert first.extras["mask@b_qk"].shape == (2, 1, 2, 2)
    assert rest.extras["mask@b_qk"].shape == (2, 1, 3, 5)
    assert rest.extras["axes@b_q_"].shape == (2, 3, 3, 4)
    assert torch.equal(rest.extras["fixed@b_"], whole.extras["fixed@b_"])
    assert torch.equal(rest.at, whole.at - 2)
    assert torch.equal(rest.labels, whole.labels)
    assert bool((first.labels == IGNORE).all())


def test_labels_behind_a_cut_stay_and_before_it_go():
    whole = batch(scored=3)  # scored at 1, 2, 3
    rest = later(whole, 2)
    assert rest.labels[:, 0].eq(IGNORE).all()
    assert torch.equal(rest.labels[:, 1:], whole.labels[:, 1:])
    assert torch.equal(rest.at[0], torch.tensor([0, 0, 1]))
    first = earlier(whole, 2)
    assert torch.equal(first.labels[:, :1], whole.labels[:, :1])
    assert first.labels[:, 1:].eq(IGNORE).all()


def test_pick_keeps_keys_and_gathers_queries():
    whole = batch()
    few = pick(whole, whole.at)
    row = torch.arange(2)[:, None]
    assert torch.equal(few.hidden, whole.hidden[row, whole.at])
    assert few.extras["mask@b_qk"].shape == (2, 1, 2, 5)
    assert torch.equal(few.extras["axes@b_q_"][0], whole.extras["axes@b_q_"][0][:, whole.at[0]])
    assert torch.equal(few.positions[:, 0], whole.at)


def test_padding_is_masked_out_and_trimmed_again():
    whole = batch()
    long = pad(whole, 8, 4)
    assert not long.mask[:, 5:].any()
    assert not long.extras["mask@b_qk"][..., 5:].any()
    assert long.extras["mask@b_qk"].any(-1).all()  # every query still has a key
    lowest = torch.finfo(torch.float32).min
    assert long.extras["bias@b_qk"][..., 5:].eq(lowest).all()
    assert long.labels[:, 2:].eq(IGNORE).all()
    back = trim(long, 5)
    assert torch.equal(back.hidden, whole.hidden)
    assert all(torch.equal(back.extras[key], value) for key, value in whole.extras.items())
    with pytest.raises(ShapeMismatch, match="padded to be longer"):
        pad(whole, 3)


def test_concat_pads_to_the_longest_and_fills_what_is_missing():
    short, long = batch(1, 4, 1), batch(2, 6, 2, seed=1, added=True)
    joined = concat([short, long])
    assert joined.hidden.shape == (3, 6, 3)
    assert joined.labels.shape == (3, 2)
    assert joined.extras["added.0@bq_"][0].eq(0).all()
    assert torch.equal(joined.extras["added.0@bq_"][1:], long.extras["added.0@bq_"])
    assert torch.equal(joined.hidden[0, :4], short.hidden[0])
    with pytest.raises(ShapeMismatch, match=r"depths \[1, 2\]"):
        concat([short, long._replace(depth=2)])


def test_thinned_batches_of_different_lengths_are_joined():
    short, long = (pick(b, b.at) for b in (batch(), batch(length=8, seed=1)))
    both = concat([short, long])
    assert both.hidden.shape[:2] == (4, 2)
    assert both.extras["mask@b_qk"].shape == (4, 1, 2, 8)
    assert torch.equal(both.extras["mask@b_qk"][:2, ..., :5], short.extras["mask@b_qk"])
    assert not both.extras["mask@b_qk"][:2, ..., 5:].any()


def test_a_batch_behind_a_past_keeps_the_past_keys():
    behind = batch(past=3)
    long = pad(behind, 7)
    assert long.extras["mask@b_qk"].shape == (2, 1, 7, 10)
    assert torch.equal(long.extras["mask@b_qk"][:, :, :5, :8], behind.extras["mask@b_qk"])


def test_nothing_is_written_in_place():
    whole = batch()
    tensors = [whole.hidden, whole.mask, whole.labels, whole.at, *whole.extras.values()]
    before = [tensor._version for tensor in tensors]
    for _ in (pad(whole, 9), earlier(whole, 1), later(whole, 1), pick(whole, whole.at)):
        concat([whole, whole])
    assert before == [tensor._version for tensor in tensors]
