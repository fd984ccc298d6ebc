"""Row algebra: batches cut, padded, joined and cut in time answer as the whole does."""

import pytest
import torch

from errata.functional import IGNORE
from errata.functional.errors import ShapeMismatch
from errata.functional.rows import concat, earlier, later, pad, pick, take, trim


@pytest.fixture
def batch(toy, queries):
    return toy.embed(toy.params, toy.read(queries), edit=torch.arange(5))


def decode(toy, batch, **options):
    return toy.decode(toy.params, batch, **options)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rows_are_independent(toy, batch, depth):
    batch = decode(toy, batch, stop=depth)
    whole = decode(toy, batch)
    index = torch.tensor([3, 0, 3])
    some = take(batch, index)
    assert some.edit.tolist() == [3, 0, 3]
    close(decode(toy, some), whole[index])
    close(decode(toy, take(batch, slice(1, 4))), whole[1:4])
    keep = torch.tensor([True, False, False, True, True])
    close(decode(toy, take(batch, keep)), whole[keep])


def test_padding_changes_no_answer(toy, batch):
    whole, longer = decode(toy, batch), pad(batch, 20, 6)
    assert longer.hidden.shape[1] == 20
    assert longer.labels.shape == (5, 6)
    assert (longer.labels[:, 4:] == IGNORE).all()
    assert not longer.mask[:, 12:].any()
    got = decode(toy, longer)
    assert torch.isfinite(got).all()
    close(got[:, :4], whole)
    close(decode(toy, trim(longer, 12))[:, :4], whole)
    with pytest.raises(ShapeMismatch, match="asked for 3 tokens, has 12"):
        pad(batch, 3)


def test_batches_read_apart_can_be_joined(toy, queries, batch):
    whole = decode(toy, batch)
    parts = [toy.embed(toy.params, toy.read([query])) for query in queries]
    assert len({part.hidden.shape[1] for part in parts}) > 1
    joined = concat(parts)
    assert joined.rows == 5
    close(decode(toy, joined), whole)
    with pytest.raises(ShapeMismatch, match=r"depths \[0, 1\]"):
        concat([parts[0], decode(toy, parts[1], stop=1)])


def test_an_extra_that_some_batches_lack_is_zero_there(batch):
    one, two = take(batch, slice(0, 1)), take(batch, slice(1, 2))
    one = one._replace(extras={**one.extras, "added.0@bq_": torch.ones_like(one.hidden)})
    added = concat([one, two]).extras["added.0@bq_"]
    assert (added[0] == 1).all()
    assert (added[1] == 0).all()


@pytest.mark.parametrize("t", [1, 3, 5])
def test_cut_in_time_is_exact(toy, batch, t):
    """Positions from t on, over the keys and values of those before, say what the whole says."""
    whole = decode(toy, batch)
    early = earlier(batch, t)
    first, past = decode(toy, early, keep=True)
    late = later(batch, t)
    second = decode(toy, late, past=past)
    scored = batch.labels != IGNORE
    before, after = scored & (batch.at < t), scored & (batch.at >= t)
    assert torch.equal(early.labels != IGNORE, before)
    assert torch.equal(late.labels != IGNORE, after)
    assert after.any()
    close(first[before], whole[before])
    close(second[after], whole[after])


def test_picked_tokens_keep_their_keys(batch):
    few = pick(batch, batch.at)
    assert few.hidden.shape[1] == batch.at.shape[1]
    for row in range(5):
        assert torch.equal(few.hidden[row], batch.hidden[row, batch.at[row]])
        attend = batch.extras["attend@b_qk"][row, 0, batch.at[row]]
        assert torch.equal(few.extras["attend@b_qk"][row, 0], attend)
        assert torch.equal(few.positions[row, 0], batch.positions[row, 0, batch.at[row]])
