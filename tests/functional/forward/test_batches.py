"""Cutting, padding and joining batches follows the layout in the keys of extras."""

import pytest
import torch

from errata.functional import IGNORE_INDEX, Batch
from errata.functional.errors import ShapeError
from errata.functional.forward.batches import (
    concat_batches,
    gather_tokens,
    pad_batch,
    take_rows,
    tokens_before,
    tokens_from,
    trim_batch,
)


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
        hidden_states=torch.randn(rows, length, 3, generator=generator),
        attention_mask=mask,
        position_ids=torch.arange(length).expand(rows, 1, length),
        image_mask=torch.zeros(rows, length, dtype=torch.bool),
        prompt_end=torch.arange(length).expand(rows, length) == at[:, :1],
        labels=torch.randint(0, 9, (rows, scored), generator=generator),
        logit_positions=at,
        edit_index=torch.arange(rows),
        layer_inputs=extras,
        depth=1,
    )


def test_take_gathers_rows_of_everything():
    whole = batch(3)
    few = take_rows(whole, torch.tensor([2, 0]))
    assert torch.equal(few.hidden_states, whole.hidden_states[[2, 0]])
    assert torch.equal(few.edit_index, torch.tensor([2, 0]))
    assert all(
        torch.equal(few.layer_inputs[key], whole.layer_inputs[key][[2, 0]])
        for key in whole.layer_inputs
    )
    assert few.depth == 1
    assert take_rows(whole, slice(1, 2)).num_rows == 1


def test_a_cut_in_time_splits_queries_and_shares_keys():
    whole = batch()
    first, rest = tokens_before(whole, 2), tokens_from(whole, 2)
    assert torch.equal(torch.cat([first.hidden_states, rest.hidden_states], 1), whole.hidden_states)
    assert torch.equal(torch.cat([first.position_ids, rest.position_ids], 2), whole.position_ids)
    assert first.layer_inputs["mask@b_qk"].shape == (2, 1, 2, 2)
    assert rest.layer_inputs["mask@b_qk"].shape == (2, 1, 3, 5)
    assert rest.layer_inputs["axes@b_q_"].shape == (2, 3, 3, 4)
    assert torch.equal(rest.layer_inputs["fixed@b_"], whole.layer_inputs["fixed@b_"])
    assert torch.equal(rest.logit_positions, whole.logit_positions - 2)
    assert torch.equal(rest.labels, whole.labels)
    assert bool((first.labels == IGNORE_INDEX).all())


def test_labels_behind_a_cut_stay_and_before_it_go():
    whole = batch(scored=3)  # scored at 1, 2, 3
    rest = tokens_from(whole, 2)
    assert rest.labels[:, 0].eq(IGNORE_INDEX).all()
    assert torch.equal(rest.labels[:, 1:], whole.labels[:, 1:])
    assert torch.equal(rest.logit_positions[0], torch.tensor([0, 0, 1]))
    first = tokens_before(whole, 2)
    assert torch.equal(first.labels[:, :1], whole.labels[:, :1])
    assert first.labels[:, 1:].eq(IGNORE_INDEX).all()


def test_pick_keeps_keys_and_gathers_queries():
    whole = batch()
    few = gather_tokens(whole, whole.logit_positions)
    row = torch.arange(2)[:, None]
    assert torch.equal(few.hidden_states, whole.hidden_states[row, whole.logit_positions])
    assert few.layer_inputs["mask@b_qk"].shape == (2, 1, 2, 5)
    assert torch.equal(
        few.layer_inputs["axes@b_q_"][0],
        whole.layer_inputs["axes@b_q_"][0][:, whole.logit_positions[0]],
    )
    assert torch.equal(few.position_ids[:, 0], whole.logit_positions)


def test_padding_is_masked_out_and_trimmed_again():
    whole = batch()
    long = pad_batch(whole, 8, 4)
    assert not long.attention_mask[:, 5:].any()
    assert not long.layer_inputs["mask@b_qk"][..., 5:].any()
    assert long.layer_inputs["mask@b_qk"].any(-1).all()  # every query still has a key
    lowest = torch.finfo(torch.float32).min
    assert long.layer_inputs["bias@b_qk"][..., 5:].eq(lowest).all()
    assert long.labels[:, 2:].eq(IGNORE_INDEX).all()
    back = trim_batch(long, 5)
    assert torch.equal(back.hidden_states, whole.hidden_states)
    assert all(
        torch.equal(back.layer_inputs[key], value) for key, value in whole.layer_inputs.items()
    )
    with pytest.raises(ShapeError, match="padded to be longer"):
        pad_batch(whole, 3)


def test_concat_pads_to_the_longest_and_fills_what_is_missing():
    short, long = batch(1, 4, 1), batch(2, 6, 2, seed=1, added=True)
    joined = concat_batches([short, long])
    assert joined.hidden_states.shape == (3, 6, 3)
    assert joined.labels.shape == (3, 2)
    assert joined.layer_inputs["added.0@bq_"][0].eq(0).all()
    assert torch.equal(joined.layer_inputs["added.0@bq_"][1:], long.layer_inputs["added.0@bq_"])
    assert torch.equal(joined.hidden_states[0, :4], short.hidden_states[0])
    with pytest.raises(ShapeError, match=r"depths \[1, 2\]"):
        concat_batches([short, long._replace(depth=2)])


def test_thinned_batches_of_different_lengths_are_joined():
    short, long = (gather_tokens(b, b.logit_positions) for b in (batch(), batch(length=8, seed=1)))
    both = concat_batches([short, long])
    assert both.hidden_states.shape[:2] == (4, 2)
    assert both.layer_inputs["mask@b_qk"].shape == (4, 1, 2, 8)
    assert torch.equal(both.layer_inputs["mask@b_qk"][:2, ..., :5], short.layer_inputs["mask@b_qk"])
    assert not both.layer_inputs["mask@b_qk"][:2, ..., 5:].any()


def test_a_batch_behind_a_past_keeps_the_past_keys():
    later = batch(past=3)
    long = pad_batch(later, 7)
    assert long.layer_inputs["mask@b_qk"].shape == (2, 1, 7, 10)
    assert torch.equal(
        long.layer_inputs["mask@b_qk"][:, :, :5, :8], later.layer_inputs["mask@b_qk"]
    )


def test_nothing_is_written_in_place():
    whole = batch()
    tensors = [
        whole.hidden_states,
        whole.attention_mask,
        whole.labels,
        whole.logit_positions,
        *whole.layer_inputs.values(),
    ]
    before = [tensor._version for tensor in tensors]
    for _ in (
        pad_batch(whole, 9),
        tokens_before(whole, 1),
        tokens_from(whole, 1),
        gather_tokens(whole, whole.logit_positions),
    ):
        concat_batches([whole, whole])
    assert before == [tensor._version for tensor in tensors]
