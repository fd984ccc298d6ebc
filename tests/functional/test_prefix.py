"""Cutting at the lowest edited place: what it is, and that nothing is lost."""

import pytest
import torch

from errata.functional import prefix
from errata.functional.bind import bind
from errata.functional.prefix import Reach

from .test_bind import DENSE, dense, logits, lowrank

REACH = {
    "head": (["head.weight"], Reach(embed=True)),  # tied to the token embedding
    "norm": (["norm.weight"], Reach(layer=3, scored=True)),
    "last mlp": (["layers.2.up.weight", "layers.2.down.bias"], Reach(layer=2, scored=True)),
    "last attention": (["layers.2.attn.o.weight"], Reach(layer=2)),
    "norm before attention": (["layers.2.norm.weight"], Reach(layer=2)),
    "two layers": (["layers.2.down.weight", "layers.1.down.weight"], Reach(layer=1)),
    "projector": (["projector.bias", "layers.2.down.weight"], Reach(embed=True)),
    "positions": (["places.weight"], Reach(embed=True)),
    "nothing": ([], Reach(layer=3, scored=True)),
    "a module": (["layers.1"], Reach(layer=1)),
}


@pytest.mark.parametrize(("names", "want"), REACH.values(), ids=REACH)
def test_reach_is_the_lowest_place(toy, names, want):
    got = prefix.reach(toy.card, names)
    assert got.embed == want.embed
    if not want.embed:
        assert got == want


def test_reaches_join():
    assert prefix.join([Reach(layer=2, scored=True), Reach(layer=1)]) == Reach(layer=1)
    assert prefix.join([Reach(layer=2, scored=True), Reach(layer=3, scored=True)]).scored
    assert prefix.join([Reach(embed=True), Reach(layer=2)]).embed


SITES = {**DENSE, "last mlp": ["layers.2.up.weight"], "final norm": ["norm.weight"]}


@pytest.mark.parametrize("names", SITES.values(), ids=SITES)
@pytest.mark.parametrize("edits", [0, 5], ids=["one", "stacked"])
def test_cut_then_finish_is_the_whole(toy, queries, names, edits):
    bound = bind(toy, dense(toy, names, edits=edits))
    edit = torch.tensor([4, 0, -1, 2, 2]) if edits else None
    reach = prefix.reach(toy.card, names)
    short = prefix.cut(toy, toy.read(queries), reach, edit)
    got = prefix.finish(bound, short, edit)
    torch.testing.assert_close(got, logits(bound, queries, edit), rtol=1e-6, atol=1e-6)
    if not reach.embed:
        assert short.depth == min(reach.layer, 2)
        assert not short.hidden.requires_grad
        wide = 3 if reach.scored else 12  # tokens carried: scored ones, or all
        assert short.hidden.shape[1] == (4 if reach.scored else wide)


def test_a_cut_serves_base_and_edits_alike(toy, queries):
    deltas = [lowrank(toy, ["layers.2.down.weight"], seed=n) for n in range(3)]
    short = prefix.cut(toy, toy.read(queries), prefix.reach(toy.card, ["layers.2.down.weight"]))
    for model in (toy, *(bind(toy, delta) for delta in deltas)):
        torch.testing.assert_close(
            prefix.finish(model, short), logits(model, queries), rtol=1e-6, atol=1e-6
        )


def test_a_batch_is_cut_further_but_never_back(toy, queries):
    batch = toy.embed(toy.params, toy.read(queries))
    shallow = prefix.cut(toy, batch, Reach(layer=1))
    deep = prefix.cut(toy, shallow, Reach(layer=2))
    assert (shallow.depth, deep.depth) == (1, 2)
    assert prefix.cut(toy, deep, Reach(layer=2)) is deep
    torch.testing.assert_close(prefix.finish(toy, deep), prefix.finish(toy, batch))
