"""What GRACE's codebook does: its policy, its kind of delta, its algebra, its cost."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from PIL import Image

from errata import adapters
from errata.editors import configure, make_editor
from errata.editors.grace import GraceConfig
from errata.editors.grace.codebook import Codebook, add_key
from errata.editors.grace.editor import resolve_edit_site
from errata.functional import BaseModel, Header, Model, Query, generate, merge, remove, scale
from errata.functional.binding.bound_model import bind
from errata.functional.deltas.stacking import select_edits, stack, unstack
from errata.functional.errors import (
    InvalidInputError,
    InvalidSettingsError,
    UnknownSiteError,
    UnsupportedKindError,
    UnsupportedModelError,
)
from errata.functional.forward import batches
from errata.functional.header import validate_header
from errata.functional.kinds.schema import Codebook as CodebookEntry
from tests.parity import assert_parity

GOLDEN = Path(__file__).parents[1] / "golden"
close = assert_parity


@functools.cache
def tiny(name: str) -> Model:
    return adapters.from_module(*adapters.tiny_model(name))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def empty(inner: int, out: int) -> Codebook:
    return Codebook(torch.zeros(0, inner), torch.zeros(0, out), torch.zeros(0), ())


def asked(model: Model) -> list[Query]:
    shown = [(Image.new("RGB", (32, 32), (s, 255 - s, 40)),) for s in (10, 120, 230)]
    shown = shown if model.card.takes_images else [(), (), ()]
    words = [("who is it?", "bo"), ("where does it live now?", "in a town"), ("what?", "owl")]
    return [Query(prompt, target, images) for (prompt, target), images in zip(words, shown)]


def logits(model: Model, queries: list[Query], edit: torch.Tensor | None = None) -> torch.Tensor:
    inputs = model.preprocess(queries)
    return model.decode(model.params, model.embed(model.params, inputs, edit_index=edit))


# ------------------------------------------------------------------ the policy


def test_a_widened_ball_covers_its_edit_after_rounding():
    book, _ = add_key(empty(2, 1), torch.tensor([30.0, 0.0]), torch.ones(1), "a", 1.0)
    book, key = add_key(book, torch.tensor([31.5, 0.0]), torch.ones(1), "a", 1.0, noise=1e-4)
    assert key == 0
    assert 1.5 < float(book.radii[0]) < 1.51


def test_keys_that_rounding_could_swap_are_one_key():
    book, _ = add_key(empty(2, 1), torch.tensor([30.0, 0.0]), torch.ones(1), "a", 1.0)
    book, key = add_key(book, torch.tensor([30.001, 0.0]), torch.zeros(1), "b", 1.0, noise=1e-4)
    assert (key, book.targets) == (0, ("b",))
    with pytest.raises(InvalidInputError, match="finite"):
        add_key(book, torch.tensor([torch.nan, 0.0]), torch.zeros(1), "b", 1.0)


# ------------------------------------------------------------------ the kind


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "blip2", "gpt2"])
def test_only_the_edits_own_prompt_changes(family):
    """D10: the key is read at each row's own last prompt token, whatever stands beside it."""
    model = tiny(family)
    queries = asked(model)
    editor = make_editor(GraceConfig(num_steps=3, radius=1e-3))
    delta, _ = editor.edit(model, editor.init(model, seeded()), queries[:1])
    edited = bind(model, delta)
    base, got = logits(model, queries), logits(edited, queries)
    assert not torch.allclose(got[0], base[0])
    assert torch.equal(got[1:], base[1:])
    alone = logits(edited, queries[:1])
    torch.testing.assert_close(got[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["last", "prompt", "all"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "blip2", "gpt2"])
def test_a_generated_answer_is_that_of_one_pass(family, where):
    """The value acts while the prompt runs and at no generated token: greedy words, then the same
    words in one pass, are each the likeliest.
    """
    model = tiny(family)
    query = asked(model)[0]
    editor = make_editor(GraceConfig(num_steps=10, replacement=where))
    delta, _ = editor.edit(model, editor.init(model, seeded()), [query])
    edited = bind(model, delta)
    inputs = model.preprocess([query._replace(target="")])
    _, past = edited.decode(
        edited.params, edited.embed(edited.params, inputs), logit_positions="all", return_cache=True
    )
    first = edited.decode(
        edited.params,
        edited.embed(edited.params, inputs),
        logit_positions=inputs.attention_mask.sum(-1)[:, None] - 1,
    )
    token = first[:, -1].argmax(-1, keepdim=True)
    later = edited.embed_next(edited.params, token, past)
    assert not later.prompt_end.any()
    cached = edited.decode(edited.params, later, kv_cache=past)
    longer = inputs._replace(
        input_ids=torch.cat([inputs.input_ids, token], 1),
        attention_mask=torch.cat(
            [inputs.attention_mask, torch.ones_like(token, dtype=torch.bool)], 1
        ),
        image_mask=torch.cat([inputs.image_mask, torch.zeros_like(token, dtype=torch.bool)], 1),
        labels=token,
        logit_positions=inputs.attention_mask.sum(-1, keepdim=True) - 1,
    )
    whole = edited.embed(edited.params, longer)
    assert torch.equal(whole.prompt_end.int().argmax(1), inputs.attention_mask.sum(-1) - 1)
    once = edited.decode(
        edited.params, whole, logit_positions=longer.attention_mask.sum(-1, keepdim=True) - 1
    )
    torch.testing.assert_close(cached, once, rtol=1e-4, atol=1e-5)


def test_a_family_without_a_cache_generates_the_same():
    model = tiny("llava")
    query = asked(model)[0]
    editor = make_editor(GraceConfig(num_steps=20, layer=0))
    delta, _ = editor.edit(model, editor.init(model, seeded()), [query])

    def decode(*args, return_cache=False, **options):
        if return_cache:
            raise UnsupportedModelError("keeps no keys and values.")
        return model.decode(*args, **options)

    slow = model._replace(decode=decode)
    said = generate(bind(model, delta), [query], 6)
    assert generate(bind(slow, delta), [query], 6) == said
    assert generate(model, [query], 6) != said
    again, _ = editor.edit(slow, editor.init(slow, seeded()), [query])  # trains on whole rows
    for name, tensor in delta.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-3, atol=1e-3)


def test_each_row_looks_into_its_own_book_also_under_vmap():
    model = tiny("llava")
    queries = asked(model)
    editor = make_editor(GraceConfig(num_steps=3))
    state = editor.init(model, seeded())
    _, state = editor.edit(model, state, queries[:1])
    stacked = editor.edit_each(model, state, queries)  # from a state with one edit
    edited = bind(model, stacked)
    edit = torch.tensor([0, 1, -1])
    got = logits(edited, queries, edit)
    alone = unstack(stacked)
    for row, number in enumerate(edit.tolist()):
        one = model if number < 0 else bind(model, alone[number])
        close(got[row], logits(one, queries)[row])
    assert not torch.allclose(got[1], logits(model, queries)[1])
    batch = edited.embed(edited.params, model.preprocess(queries), edit_index=edit)
    moved = torch.stack([batch.hidden_states, batch.hidden_states.flip(0), 2 * batch.hidden_states])
    for one in (edited, bind(model, alone[0])):

        def run(hidden, one=one):
            return one.decode(one.params, batch._replace(hidden_states=hidden))

        close(torch.vmap(run)(moved), torch.stack([run(h) for h in moved]))
    assert stack(alone).header.edits == stacked.header.edits
    assert [one.header for one in unstack(stacked)] == [one.header for one in alone]
    assert (
        select_edits(stacked, [2]).header.entries[0].edit_slots
        == stacked.header.entries[0].edit_slots[2:]
    )


# ------------------------------------------------------------------ the algebra


def sequence(model: Model, queries: list[Query], **settings):
    editor = make_editor(GraceConfig(num_steps=5, **settings))
    state = editor.init(model, seeded())
    for query in queries:
        delta, state = editor.edit(model, state, [query])
    return delta


def test_an_edit_is_deleted_by_its_id():
    """D11: ids and keys stay in step, from the second key on."""
    model = tiny("llava")
    queries = asked(model)
    whole = sequence(model, queries, radius=1e-3)
    gone = whole.header.edits[1].id
    less = remove(whole, [gone])
    assert less.header.entries[0].edit_slots == (0, 1)
    got, full, base = (logits(m, queries) for m in (bind(model, less), bind(model, whole), model))
    assert torch.equal(got[1], base[1])
    assert torch.equal(got[[0, 2]], full[[0, 2]])
    assert not torch.allclose(full[1], base[1])
    assert not remove(less, [0, 1]).header.entries


def test_a_key_shared_by_two_edits_stays_with_the_other():
    model = tiny("llava")
    first = asked(model)[0]
    whole = sequence(model, [first, first._replace(prompt="who is it ?")], radius=100.0)
    assert whole.header.entries[0].edit_slots == (0, 0)
    less = remove(whole, [0])
    assert (less.header.entries[0].num_keys, less.header.entries[0].edit_slots) == (1, (0,))


def test_an_edit_taken_over_has_no_key():
    model = tiny("llava")
    first = asked(model)[0]
    for delta in (
        sequence(model, [first, first._replace(target="al")]),
        make_editor(GraceConfig(num_steps=2)).edit(
            model,
            make_editor(GraceConfig(num_steps=2)).init(model, seeded()),
            [first, first._replace(target="al")],
        )[0],
    ):
        assert delta.header.entries[0].edit_slots == (-1, 0)
        assert not validate_header(delta.header)


def test_books_are_joined_and_a_value_is_not_scaled():
    model = tiny("llava")
    queries = asked(model)
    one, two = (sequence(model, [query], radius=1e-3) for query in queries[:2])
    both = merge(one, two)
    assert both.header.entries[0].edit_slots == (0, 1)
    got = logits(bind(model, both), queries)
    assert torch.equal(got[0], logits(bind(model, one), queries)[0])
    assert torch.equal(got[1], logits(bind(model, two), queries)[1])
    other = sequence(model, [queries[0]._replace(target="al")])
    with pytest.raises(InvalidInputError, match="the same key"):
        merge(one, other, allow_conflicts=True)
    with pytest.raises(UnsupportedKindError, match="replaces an output"):
        scale(one, 0.5)


def test_faults_of_an_entry_are_listed():
    entry = CodebookEntry(name="w", checkpoint_name="w", shape=(2, 3), num_keys=0, edit_slots=(4,))
    found = validate_header(Header(base=BaseModel(id="a/model"), entries=(entry,)))
    assert len(found) == 2
    assert "at least 1 key" in found[0]


# ------------------------------------------------------------------ the door, the cost


def test_the_site_is_a_layer_by_number_or_by_share():
    model = tiny("llava")  # three layers
    layers = [
        resolve_edit_site(model, GraceConfig(layer=at)).layer for at in (2 / 3, 0.0, 0, 1, -1)
    ]
    assert layers == [0, 0, 0, 1, 2]
    deep = adapters.from_module(*adapters.tiny_model("gpt2", num_layers=7))
    layers = [resolve_edit_site(deep, GraceConfig(layer=at)).layer for at in (2 / 3, 0.3, 0.99, -2)]
    assert layers == [4, 2, 4, 5]
    with pytest.raises(UnknownSiteError, match="has 3"):
        resolve_edit_site(model, GraceConfig(layer=7))
    with pytest.raises(InvalidSettingsError, match="lower layer"):
        resolve_edit_site(model, GraceConfig(layer=-1, replacement="prompt"))
    assert configure("grace", "easyedit", layer=1).num_steps == 20


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "blip2"])
def test_only_tokens_from_the_key_on_are_run_again(family):
    """Layers above the cut see whole rows once; each step runs the few tokens after them."""
    model = tiny(family)
    tokens = []

    def decode(params, batch, hooks=None, **options):
        stop = options.get("stop")
        count = (model.card.num_layers if stop is None else stop) - batch.depth
        tokens.append(count * batch.hidden_states.shape[1])
        return model.decode(params, batch, hooks, **options)

    query = asked(model)[1]
    config = GraceConfig(layer=1, num_steps=6, stop_loss=0.0)
    editor = make_editor(config)
    editor.edit(model._replace(decode=decode), editor.init(model, seeded()), [query])
    inputs = model.preprocess([query], append_eos=True)
    length, above = inputs.input_ids.shape[1], model.card.num_layers - 1
    first = int(batches.prompt_end_mask(inputs).int().argmax())
    few = length - first
    assert tokens == [length, above * first, few] + [above * few] * 6
