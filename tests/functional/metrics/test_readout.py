"""What a model answers, without keeping its logits."""

import pytest
import torch

from errata.functional import IGNORE_INDEX, bind, read_out
from errata.functional.deltas.stacking import unstack
from errata.functional.forward import prefix
from errata.functional.metrics.readout import make_readout
from tests.functional.binding.test_bound_model import dense, logits


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("held", [1 << 25, 1], ids=["at once", "row by row"])
def test_answers_are_the_reading_of_the_logits(toy, queries, monkeypatch, everywhere, held):
    monkeypatch.setitem(read_out.__globals__, "_ELEMENTS", held)
    inputs = toy.preprocess(queries)
    got = read_out(toy, inputs, k=3, all_positions=everywhere)
    want = make_readout(logits(toy, queries), inputs.labels, 3)
    assert torch.equal(got.top_ids, want.top_ids)
    torch.testing.assert_close(got.nll, want.nll)
    assert torch.equal(got.labels, inputs.labels)
    if not everywhere:
        assert got.all_top_ids is None
        return
    assert got.all_top_ids.shape == (5, inputs.input_ids.shape[1], 3)
    assert torch.equal(got.all_top_ids[..., 0] == -1, ~inputs.attention_mask)
    at = got.all_top_ids.gather(1, inputs.logit_positions[..., None].expand(-1, -1, 3))
    keep = inputs.labels != IGNORE_INDEX
    assert torch.equal(at[keep], got.top_ids[keep])


def test_rows_answer_under_their_edit(toy, queries):
    delta = dense(toy, ["layers.2.down.weight"], edits=2, size=1.0)
    short = prefix.run_prefix(
        toy, toy.preprocess(queries), prefix.edit_depth(toy.card, ["layers.2.down.weight"])
    )
    edit = torch.tensor([1, 0, -1, 1, 0])
    got = read_out(bind(toy, delta), short, edit_index=edit)
    alone = [toy if e < 0 else bind(toy, unstack(delta)[e]) for e in edit.tolist()]
    for row, model in enumerate(alone):
        want = read_out(model, short)
        torch.testing.assert_close(got.nll[row], want.nll[row])
        assert torch.equal(got.top_ids[row], want.top_ids[row])
    assert not torch.equal(got.top_ids, read_out(toy, short).top_ids)
