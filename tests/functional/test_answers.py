"""What a model answers, without keeping its logits."""

import pytest
import torch

from errata.functional import IGNORE, answers, bind, prefix
from errata.functional.metrics import reading
from errata.functional.stacks import unstack

from .test_bind import dense, logits


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("held", [1 << 25, 1], ids=["at once", "row by row"])
def test_answers_are_the_reading_of_the_logits(toy, queries, monkeypatch, everywhere, held):
    monkeypatch.setitem(answers.__globals__, "_ELEMENTS", held)
    inputs = toy.read(queries)
    got = answers(toy, inputs, k=3, everywhere=everywhere)
    want = reading(logits(toy, queries), inputs.labels, 3)
    assert torch.equal(got.top, want.top)
    torch.testing.assert_close(got.nll, want.nll)
    assert torch.equal(got.labels, inputs.labels)
    if not everywhere:
        assert got.whole is None
        return
    assert got.whole.shape == (5, inputs.ids.shape[1], 3)
    assert torch.equal(got.whole[..., 0] == -1, ~inputs.mask)
    at = got.whole.gather(1, inputs.at[..., None].expand(-1, -1, 3))
    keep = inputs.labels != IGNORE
    assert torch.equal(at[keep], got.top[keep])


def test_rows_answer_under_their_edit(toy, queries):
    delta = dense(toy, ["layers.2.down.weight"], edits=2, size=1.0)
    short = prefix.cut(toy, toy.read(queries), prefix.reach(toy.card, ["layers.2.down.weight"]))
    edit = torch.tensor([1, 0, -1, 1, 0])
    got = answers(bind(toy, delta), short, edit=edit)
    alone = [toy if e < 0 else bind(toy, unstack(delta)[e]) for e in edit.tolist()]
    for row, model in enumerate(alone):
        want = answers(model, short)
        torch.testing.assert_close(got.nll[row], want.nll[row])
        assert torch.equal(got.top[row], want.top[row])
    assert not torch.equal(got.top, answers(toy, short).top)
