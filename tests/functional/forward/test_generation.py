"""Generation with a cache against decoding the whole row again for every word."""

import pytest
import torch

from errata.functional import Inputs, bind, generate
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import InvalidInputError, UnsupportedModelError
from errata.functional.forward.generation import generate_ids
from tests.functional.binding.test_bound_model import dense, lowrank


def said_slowly(model, queries, count, ends=()):
    """One row at a time, no cache: append the likeliest token and run everything again."""
    rows = []
    for query in queries:
        inputs = model.preprocess([query._replace(target="")])
        ids = inputs.input_ids
        for _ in range(count):
            length = ids.shape[1]
            image = torch.zeros_like(ids, dtype=torch.bool)
            image[:, : inputs.image_mask.shape[1]] = inputs.image_mask
            last = torch.tensor([[length - 1]])
            mask = torch.ones_like(ids, dtype=torch.bool)
            whole = Inputs(ids, mask, image, last, last, inputs.vision_inputs)
            logits = model.decode(model.params, model.embed(model.params, whole))
            token = logits[:, 0].argmax(-1)
            if int(token) in ends:
                break
            ids = torch.cat([ids, token[:, None]], 1)
        rows.append(ids[0, inputs.input_ids.shape[1] :].tolist())
    return rows


def words(model, rows):
    return [model.detokenize(ids) for ids in rows]


def test_the_cache_changes_nothing(toy, queries):
    want = said_slowly(toy, queries, 8)
    assert generate(toy, queries, 8, stop_ids=()) == words(toy, want)
    assert len({tuple(row) for row in want}) > 1, "rows say different things"


def test_a_row_ends_at_its_own_stop_token(toy, queries):
    free = said_slowly(toy, queries, 8)
    ends = (free[0][3], free[2][1])
    want = said_slowly(toy, queries, 8, ends)
    assert generate(toy, queries, 8, stop_ids=ends) == words(toy, want)
    assert min(map(len, want)) < 8


def test_a_family_without_a_cache_says_the_same(toy, queries):
    def decode(*args, return_cache=False, **options):
        if return_cache:
            raise UnsupportedModelError("tests/toy keeps no keys and values.")
        return toy.decode(*args, **options)

    slow = toy._replace(decode=decode)
    want = said_slowly(toy, queries, 6)
    assert (
        generate_ids(slow, toy.preprocess([q._replace(target="") for q in queries]), 6, stop_ids=())
        == want
    )


def test_the_card_knows_what_ends_an_answer(toy, queries):
    free = said_slowly(toy, queries, 6)
    card = type(toy.card)(
        **{f: getattr(toy.card, f) for f in toy.card.__struct_fields__}
        | {"stop_ids": (free[1][2],)}
    )
    want = said_slowly(toy, queries, 6, card.stop_ids)
    assert generate(toy._replace(card=card), queries, 6) == words(toy, want)


@pytest.mark.parametrize("make", [dense, lowrank], ids=["dense", "lowrank"])
def test_bound_deltas_are_heard(toy, queries, make):
    delta = make(toy, ["layers.1.down.weight", "layers.2.attn.v.weight"])
    bound = bind(toy, delta._replace(tensors={n: t * 4 for n, t in delta.tensors.items()}))
    assert generate(bound, queries, 6, stop_ids=()) == words(bound, said_slowly(bound, queries, 6))
    assert generate(bound, queries, 6, stop_ids=()) != generate(toy, queries, 6, stop_ids=())


@pytest.mark.parametrize(
    "names",
    [["layers.1.down.weight"], ["tokens.weight"], ["layers.0.norm.weight", "projector.weight"]],
    ids=["linear", "tied tokens", "norm and projector"],
)
def test_rows_speak_under_their_edit(toy, queries, names):
    delta = dense(toy, names, edits=2, size=0.7)
    edit = torch.tensor([1, 0, -1, 0, 1])
    got = generate(bind(toy, delta), queries, 5, stop_ids=(), edit_index=edit)
    alone = [toy if e < 0 else bind(toy, unstack(delta)[e]) for e in edit.tolist()]
    assert got == [generate(m, [q], 5, stop_ids=())[0] for m, q in zip(alone, queries)]


def test_what_can_not_fit_is_refused_before_anything_runs(toy, queries):
    with pytest.raises(InvalidInputError, match="32 tokens.*longest prompt has 10 and 30"):
        generate(toy, queries, 30)
    with pytest.raises(InvalidInputError, match="at least 1, got 0"):
        generate(toy, queries, 0)
