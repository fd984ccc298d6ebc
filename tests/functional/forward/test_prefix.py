"""Cutting at the lowest edited place: what it is, and that nothing is lost."""

import pytest
import torch

from errata.functional.binding.bound_model import bind
from errata.functional.forward import prefix
from errata.functional.forward.prefix import EditDepth
from tests.functional.binding.test_bound_model import DENSE, dense, logits, lowrank

REACH = {
    "head": (["head.weight"], EditDepth(before_decoder=True)),  # tied to the token embedding
    "norm": (["norm.weight"], EditDepth(layer=3, scored_only=True)),
    "last mlp": (
        ["layers.2.up.weight", "layers.2.down.bias"],
        EditDepth(layer=2, scored_only=True),
    ),
    "last attention": (["layers.2.attn.o.weight"], EditDepth(layer=2)),
    "norm before attention": (["layers.2.norm.weight"], EditDepth(layer=2)),
    "two layers": (["layers.2.down.weight", "layers.1.down.weight"], EditDepth(layer=1)),
    "projector": (["projector.bias", "layers.2.down.weight"], EditDepth(before_decoder=True)),
    "positions": (["places.weight"], EditDepth(before_decoder=True)),
    "nothing": ([], EditDepth(layer=3, scored_only=True)),
    "a module": (["layers.1"], EditDepth(layer=1)),
}


@pytest.mark.parametrize(("names", "want"), REACH.values(), ids=REACH)
def test_reach_is_the_lowest_place(toy, names, want):
    got = prefix.edit_depth(toy.card, names)
    assert got.before_decoder == want.before_decoder
    if not want.before_decoder:
        assert got == want


def test_reaches_join():
    assert prefix.lowest_depth(
        [EditDepth(layer=2, scored_only=True), EditDepth(layer=1)]
    ) == EditDepth(layer=1)
    assert prefix.lowest_depth(
        [EditDepth(layer=2, scored_only=True), EditDepth(layer=3, scored_only=True)]
    ).scored_only
    assert prefix.lowest_depth([EditDepth(before_decoder=True), EditDepth(layer=2)]).before_decoder


SITES = {**DENSE, "last mlp": ["layers.2.up.weight"], "final norm": ["norm.weight"]}


@pytest.mark.parametrize("names", SITES.values(), ids=SITES)
@pytest.mark.parametrize("edits", [0, 5], ids=["one", "stacked"])
def test_cut_then_finish_is_the_whole(toy, queries, names, edits):
    bound = bind(toy, dense(toy, names, edits=edits))
    edit = torch.tensor([4, 0, -1, 2, 2]) if edits else None
    reach = prefix.edit_depth(toy.card, names)
    short = prefix.run_prefix(toy, toy.preprocess(queries), reach, edit)
    got = prefix.run_suffix(bound, short, edit)
    torch.testing.assert_close(got, logits(bound, queries, edit), rtol=1e-6, atol=1e-6)
    if not reach.before_decoder:
        assert short.depth == min(reach.layer, 2)
        assert not short.hidden_states.requires_grad
        wide = 3 if reach.scored_only else 12  # tokens carried: scored ones, or all
        assert short.hidden_states.shape[1] == (4 if reach.scored_only else wide)


def test_a_cut_serves_base_and_edits_alike(toy, queries):
    deltas = [lowrank(toy, ["layers.2.down.weight"], seed=n) for n in range(3)]
    short = prefix.run_prefix(
        toy, toy.preprocess(queries), prefix.edit_depth(toy.card, ["layers.2.down.weight"])
    )
    for model in (toy, *(bind(toy, delta) for delta in deltas)):
        torch.testing.assert_close(
            prefix.run_suffix(model, short), logits(model, queries), rtol=1e-6, atol=1e-6
        )


def test_a_batch_is_cut_further_but_never_back(toy, queries):
    batch = toy.embed(toy.params, toy.preprocess(queries))
    shallow = prefix.run_prefix(toy, batch, EditDepth(layer=1))
    deep = prefix.run_prefix(toy, shallow, EditDepth(layer=2))
    assert (shallow.depth, deep.depth) == (1, 2)
    assert prefix.run_prefix(toy, deep, EditDepth(layer=2)) is deep
    torch.testing.assert_close(prefix.run_suffix(toy, deep), prefix.run_suffix(toy, batch))
