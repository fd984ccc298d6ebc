"""A batch whose rows carry different deltas = the same rows, each under its own delta alone.

Low-rank rows run as one grouped product in fp32: logits agree with separate runs to 2e-5 (fp32), as
matrix products of other shapes round otherwise. Kinds that run apart agree to the same.
"""

from __future__ import annotations

import pytest
import torch

from errata.functional import Delta, EditRecord, Header, Query, bind, bind_rows
from errata.functional.deltas.records import base_identity
from errata.functional.deltas.stacking import stack
from errata.functional.errors import InvalidInputError, ShapeError, UnsupportedKindError
from errata.functional.forward.generation import generate
from errata.functional.kinds.schema import Dense
from tests.adapters.zoo_of_families.deltas import case, lowrank, sites
from tests.adapters.zoo_of_families.models import make_image

CLOSE = 2e-5
COUNT = 16


def questions(model, count=COUNT):
    asked = ["what is it?", "where is the old town?", "who wrote the book?", "a cat or two dogs?"]
    return [
        Query(asked[n % 4], "a red cat", (make_image(n),) if model.card.takes_images else ())
        for n in range(count)
    ]


def many(model):
    """Sixteen deltas of other ranks, forms' one, and other parameters each."""
    paths = sites(model)
    return [
        lowrank(model, "act_fp32", seed=n, rank=1 + n % 5, paths=paths[n % 3 :], id=f"edit-{n}")
        for n in range(COUNT)
    ]


def logits(model, queries):
    batch = model.embed(model.params, model.preprocess(queries))
    return model.decode(model.params, batch)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_a_mixed_batch_of_16_is_16_separate_runs(name):
    _, model, _, _ = case(name)
    deltas, queries = many(model), questions(model)
    order = torch.randperm(COUNT).tolist()
    got = logits(bind_rows(model, deltas, order), queries)
    for row, number in enumerate(order):
        want = logits(bind(model, deltas[number]), [queries[row]])
        torch.testing.assert_close(
            got[row : row + 1, : want.shape[1]], want, rtol=CLOSE, atol=CLOSE
        )


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_a_mixed_batch_generates_what_each_delta_generates_alone(name):
    _, model, _, _ = case(name)
    deltas, queries = many(model), questions(model)
    mixed = generate(bind_rows(model, deltas, range(COUNT)), queries, 5, stop_ids=())
    alone = [generate(bind(model, d), [q], 5, stop_ids=())[0] for d, q in zip(deltas, queries)]
    plain = generate(model, queries, 5, stop_ids=())
    assert mixed == alone
    assert mixed != plain


def test_rows_of_no_delta_answer_as_the_base():
    _, model, _, _ = case("llava")
    queries = questions(model, 3)
    got = logits(bind_rows(model, many(model)[:2], [1, -1, 0]), queries)
    want = logits(model, queries)
    torch.testing.assert_close(got[1], want[1], rtol=CLOSE, atol=CLOSE)
    assert not torch.allclose(got[0], want[0], atol=1e-2)


def test_other_kinds_run_apart_in_their_own_form():
    _, model, _, _ = case("llava")
    name = f"{sites(model)[1]}.weight"
    entry = Dense(name=name, checkpoint_name=name, shape=tuple(model.params[name].shape))
    dense = Delta(
        Header(base=base_identity(model, [name]), entries=(entry,), edits=(EditRecord(id="d"),)),
        {name: 0.2 * torch.randn(entry.shape)},
    )
    deltas = [dense, lowrank(model, "weight", seed=3), lowrank(model, "act", seed=4)]
    queries = questions(model, 4)
    bound = bind_rows(model, deltas, [2, 0, 1, -1])
    got = logits(bound, queries)
    for row, number in enumerate([2, 0, 1]):
        want = logits(bind(model, deltas[number]), [queries[row]])
        torch.testing.assert_close(
            got[row : row + 1, : want.shape[1]], want, rtol=CLOSE, atol=CLOSE
        )
    said = generate(bound, queries, 4, stop_ids=())
    assert said[1] == generate(bind(model, dense), [queries[1]], 4, stop_ids=())[0]


def test_rows_that_name_no_delta_and_batches_of_other_sizes_are_refused():
    _, model, _, _ = case("llava")
    deltas = many(model)[:2]
    for rows in ([0, 2], [-2], [[0]]):
        with pytest.raises(InvalidInputError, match="each row must name"):
            bind_rows(model, deltas, rows)
    with pytest.raises(InvalidInputError, match="each row must name"):
        bind_rows(model, [], [0])
    with pytest.raises(UnsupportedKindError, match="stacked"):
        bind_rows(model, [stack([deltas[0], deltas[0]])], [0])
    with pytest.raises(ShapeError, match="has 3"):
        logits(bind_rows(model, deltas, [0, 1]), questions(model, 3))
