"""What opens the gate of a side memory, and what its kind of delta holds to."""

from __future__ import annotations

import msgspec
import pytest
import torch

from errata.editors import make_editor
from errata.editors.finetune import FinetuneConfig
from errata.functional import BaseModel, EditRecord, Header, Model, Query, bind, bind_rows, generate
from errata.functional.deltas.stacking import select_edits, stack
from errata.functional.errors import InvalidInputError, ShapeError
from errata.functional.forward import batches, prefix
from errata.functional.forward.prefix import delta_depth
from errata.functional.header import validate_header
from errata.functional.kinds.masked.apply import gated_tokens, side_memory_hook
from errata.functional.kinds.masked.bitmask import pack_bits, scatter_values
from errata.functional.kinds.schema import Masked
from tests.editors.test_wise import (
    QUICK,
    asked,
    embedded,
    logits,
    one_by_one,
    quick,
    routes,
    seeded,
    tiny,
)
from tests.parity import assert_parity

FAMILIES = ["llava", "qwen2_vl", "blip2", "gpt2"]


# ------------------------------------------------------------------ the gate


@pytest.mark.parametrize("statistic", ["mean", "text", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_edits_own_prompt_opens_the_gate(family, statistic):
    """Whatever stands beside it or after it: padding, other rows, another answer (D14, D18)."""
    model = tiny(family)
    queries = asked(model)
    delta = one_by_one(model, quick(gate_statistic=statistic), queries[:1])
    assert routes(model, delta, queries) == [0, -1, -1]
    edited = bind(model, delta)
    base, got = logits(model, queries), logits(edited, queries)
    assert torch.equal(got[1:], base[1:])
    assert not torch.allclose(got[0], base[0])
    answers = [queries[0]._replace(target=text) for text in ("owl", "in a big town by the sea")]
    assert routes(model, delta, answers) == [0, 0]
    alone = logits(edited, queries[:1])
    torch.testing.assert_close(got[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("site", "layer"), [("mlp.down", 1), ("mlp.up", -1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_answer_is_that_of_one_pass(family, site, layer):
    """The choice made at the prompt lasts: token by token the same logits as all at once."""
    model = tiny(family)
    query = asked(model)[0]
    delta = one_by_one(model, quick(site=site, layer=layer, num_steps=8, lr=0.5), [query])
    edited = bind(model, delta)
    inputs = model.preprocess([query._replace(target="")])
    batch = edited.embed(edited.params, inputs)
    last = inputs.attention_mask.sum(-1)[:, None] - 1
    first, past = edited.decode(edited.params, batch, logit_positions=last, return_cache=True)
    token = first[:, -1].argmax(-1, keepdim=True)
    later = edited.embed_next(edited.params, token, past)
    got = edited.decode(edited.params, later, kv_cache=past)
    grown = inputs._replace(
        input_ids=torch.cat([inputs.input_ids, token], 1),
        attention_mask=torch.cat([inputs.attention_mask, torch.ones(1, 1, dtype=torch.bool)], 1),
        image_mask=torch.cat([inputs.image_mask, torch.zeros(1, 1, dtype=torch.bool)], 1),
        labels=token,
        logit_positions=last,
    )
    want = edited.decode(
        edited.params, edited.embed(edited.params, grown), logit_positions=last + 1
    )
    torch.testing.assert_close(got[:, -1], want[:, -1], rtol=1e-4, atol=1e-5)
    assert generate(edited, [query], 3) == generate(edited, [query, asked(model)[1]], 3)[:1]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt_is_thinned_away_before_the_gate(family):
    """At the last layer only scored tokens matter to a change of the map: not to the choice."""
    model = tiny(family)
    queries = asked(model)
    delta = one_by_one(model, quick(site="mlp.up", layer=-1), queries[:1])
    edited = bind(model, delta)
    cut = prefix.run_prefix(model, model.preprocess(queries), delta_depth(model, delta))
    whole = logits(edited, queries)
    assert_parity(prefix.run_suffix(edited, cut), whole)
    before = edited.decode(edited.params, embedded(edited, queries), stop=model.card.num_layers - 1)
    thinned = edited.select_scored(edited.params, before)
    got = edited.decode(edited.params, thinned)
    assert_parity(got, whole)


def test_rows_that_thin_and_rows_that_do_not_stay_in_one_batch():
    """A memory in the last layer reads whole prompts there; rows of the base need not."""
    model = tiny("llava")
    queries = asked(model)
    delta = one_by_one(model, quick(layer=-1, site="mlp.up"), queries[:1])
    mixed = bind_rows(model, [delta], [0, -1, -1])
    batch = embedded(mixed, queries)
    whole = mixed.decode(mixed.params, batch)
    before = mixed.decode(mixed.params, batch, stop=model.card.num_layers - 1)
    thinned = mixed.select_scored(mixed.params, before)
    got = mixed.decode(mixed.params, thinned)
    assert_parity(got, whole)


def memories(changes: torch.Tensor, thresholds: list[float], **settings) -> tuple[Masked, dict]:
    """Dense memories [M O I] by hand."""
    count, out, inner = changes.shape
    entry = Masked(
        name="w",
        checkpoint_name="w",
        shape=(out, inner),
        num_values=(out * inner,) * count,
        edit_slots=(0,),
        activation="identity",
        **settings,
    )
    tensors = {
        "w.mask": pack_bits(torch.ones(count, out * inner, dtype=torch.bool)),
        "w.values": changes.flatten(),
        "w.thresholds": torch.tensor(thresholds),
    }
    return entry, tensors


def test_the_furthest_memory_above_its_threshold_is_taken():
    model = tiny("llava")
    batch = embedded(model, asked(model)[:1])
    length = batch.hidden_states.shape[1]
    x, y = torch.ones(1, length, 3), torch.zeros(1, length, 2)
    changes = torch.stack([torch.full((2, 3), size) for size in (1.0, 3.0, 2.0)])
    for thresholds, taken in (
        ([0.0, 0.0, 0.0], 1),
        ([0.0, 99.0, 0.0], 2),
        ([0.0, 99.0, 99.0], 0),
        ([99.0] * 3, -1),
    ):
        entry, tensors = memories(changes, thresholds)
        hook = side_memory_hook(entry, tensors, stacked=False)
        decision = hook.decide(batch, x, y)
        assert decision["memory"].tolist() == [taken]
        got = hook.apply(batch, x, y, decision)
        want = x @ changes[taken].T if taken >= 0 else y
        assert torch.equal(got, want)


def test_easyedits_statistic_is_the_largest_of_long_prompts():
    model = tiny("llava")
    short = embedded(model, asked(model)[:1])
    reach = short.attention_mask.shape[1]
    long = short._replace(
        attention_mask=torch.ones(1, 200, dtype=torch.bool),
        prompt_end=torch.arange(200)[None] == 150,
        image_mask=torch.zeros(1, 200, dtype=torch.bool),
        routing={},
    )
    x = torch.zeros(1, 200, 3)
    x[0, 7] = 1.0  # one token of 151
    for statistic, taken in (("mean", -1), ("easyedit", 0)):
        entry, tensors = memories(torch.ones(1, 2, 3), [1.0], gate_statistic=statistic)
        hook = side_memory_hook(entry, tensors, stacked=False)
        decision = hook.decide(long, x, torch.zeros(1, 200, 2))
        assert decision["memory"].tolist() == [taken]
    assert gated_tokens(long, "mean").sum() == 151
    assert (
        gated_tokens(short, "text").sum() + short.image_mask.sum()
        == short.prompt_end.int().argmax() + 1
    )
    assert reach < 100


# ------------------------------------------------------------------ side by side


def test_a_stack_of_sequences_is_each_of_them():
    """Two memories each; a row of edit -1 is the base's."""
    model = tiny("llava")
    queries = asked(model)
    config = quick(save_freq=1, merge_freq=9)
    pairs = [[queries[0], queries[1]], [queries[2], queries[0]]]
    deltas = [one_by_one(model, config, pair) for pair in pairs]
    stacked = stack(deltas)
    edit = torch.tensor([0, 1, -1])
    edited = bind(model, stacked)
    got = logits(edited, queries, edit)
    for row, number in enumerate(edit.tolist()):
        one = bind(model, deltas[number]) if number >= 0 else model
        assert_parity(got[row], logits(one, queries)[row])
    said = generate(edited, queries, 3, edit_index=edit)
    assert said[0] == generate(bind(model, deltas[0]), queries[:1], 3)[0]
    assert said[2] == generate(model, queries[2:], 3)[0]
    assert select_edits(stacked, [1]).header.entries[0].edit_slots == (1,)


def test_edits_side_by_side_start_fresh():
    model, editor = tiny("llava"), make_editor(QUICK)
    _, state = editor.edit(model, editor.init(model, seeded()), asked(model)[:1])
    with pytest.raises(InvalidInputError, match="fresh state"):
        editor.edit_each(model, state, asked(model))


# ------------------------------------------------------------------ the kind


def header(entry: Masked) -> Header:
    return Header(base=BaseModel(id="a/model"), entries=(entry,), edits=(EditRecord(id="0"),))


def test_what_is_wrong_with_an_entry_is_named():
    entry, _ = memories(torch.ones(2, 2, 3), [0.0, 0.0])
    assert validate_header(header(entry)) == []
    for wrong, said in (
        ({"num_values": ()}, "one or more memories"),
        ({"num_values": (7,)}, "1 to 6 values"),
        ({"shape": (2,)}, "two positive sizes"),
        ({"edit_slots": (0, 1)}, "each of 1 edits"),
        ({"edit_slots": (2,)}, "memories from 0 to 1"),
    ):
        assert said in validate_header(header(msgspec.structs.replace(entry, **wrong)))[0]


def test_masks_and_values_must_agree():
    entry, tensors = memories(torch.ones(1, 2, 3), [0.0])
    tensors["w.mask"] = pack_bits(torch.tensor([[True] * 5 + [False]]))
    with pytest.raises(ShapeError, match=r"\[6\].*\[5\]"):
        side_memory_hook(entry, tensors, stacked=False)
    full = scatter_values(torch.tensor([255], dtype=torch.uint8), torch.arange(6.0), (2, 3))
    assert torch.equal(full, torch.arange(6.0).view(2, 3))  # bits past the end count for nothing


def test_one_delta_may_lie_on_another():
    model = tiny("llava")
    queries = asked(model)
    first, second = (one_by_one(model, QUICK, [query]) for query in queries[:2])
    both = bind(bind(model, first), second)
    got = logits(both, queries)
    for row, delta in enumerate((first, second)):
        want = logits(bind(model, delta), queries)[row]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)
    batch = batches.take_rows(embedded(both, queries), slice(0, 2))
    _, past = both.decode(both.params, batch, return_cache=True)
    assert {name.split(".masked.")[1][0] for name in past.routing} == {"0", "1"}


def test_rows_beside_it_may_run_with_other_deltas_or_none():
    """`bind_rows`: what was chosen at the prompt lasts where other rows chose nothing."""
    model = tiny("llava")
    queries = asked(model)
    delta = one_by_one(model, quick(num_steps=20, lr=0.5), queries[:1])
    other = make_editor(FinetuneConfig(num_steps=1))
    dense, _ = other.edit(model, other.init(model, seeded()), queries[2:])
    mixed = bind_rows(model, [delta, dense], [0, -1, 1])
    for row, alone in enumerate((bind(model, delta), model, bind(model, dense))):
        got, want = second(mixed, queries)[row], second(alone, queries)[row]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def second(model: Model, queries: list[Query]) -> torch.Tensor:
    """[B 1 V] what follows the prompts and one more token."""
    inputs = model.preprocess([query._replace(target="") for query in queries])
    batch = model.embed(model.params, inputs)
    last = inputs.attention_mask.sum(-1)[:, None] - 1
    _, past = model.decode(model.params, batch, logit_positions=last, return_cache=True)
    token = torch.full((len(queries), 1), 7)
    later = model.embed_next(model.params, token, past, edit_index=batch.edit_index)
    return model.decode(model.params, later, kv_cache=past)
