"""What LiveEdit's experts do: whom they reach, what they are in a file, how they are trained."""

from __future__ import annotations

import functools

import msgspec
import pytest
import torch
from PIL import Image

from errata import adapters
from errata.editors import configure
from errata.editors.liveedit.config import LiveEditConfig
from errata.editors.liveedit.editor import generate_experts, liveedit_editor, resolve_edit_site
from errata.functional import Delta, Hooks, Model, Query, generate, merge, remove, scale, select
from errata.functional.binding.bound_model import bind
from errata.functional.deltas.stacking import select_edits, stack, unstack
from errata.functional.errors import InvalidInputError, InvalidSettingsError
from errata.functional.header import validate_header
from tests.parity import assert_parity

SMALL = LiveEditConfig(
    untrained=True, feature_dim=8, num_heads=2, num_sentinel_tokens=4, num_text_sentinel_tokens=3
)
FAMILIES = ["llava", "qwen2_vl", "blip2", "gpt2"]


@functools.cache
def tiny(name: str) -> Model:
    return adapters.from_module(*adapters.tiny_model(name))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(model: Model) -> list[Query]:
    shown = [(Image.new("RGB", (32, 32), (s, 255 - s, 40)),) for s in (10, 120, 230)]
    shown = shown if model.card.takes_images else [(), (), ()]
    words = [("who is it?", "bo"), ("where does it live now?", "in a town"), ("what?", "owl")]
    return [Query(prompt, target, images) for (prompt, target), images in zip(words, shown)]


def sequence(model: Model, queries: list[Query], config: LiveEditConfig = SMALL):
    editor = liveedit_editor(config)
    state = editor.init(model, seeded())
    for query in queries:
        delta, state = editor.edit(model, state, [query])
    return delta, state


def logits(model: Model, queries: list[Query], edit=None) -> torch.Tensor:
    with torch.no_grad():
        return model.decode(
            model.params, model.embed(model.params, model.preprocess(queries), edit_index=edit)
        )


def routes(model: Model, delta: Delta, queries: list[Query]) -> dict[str, torch.Tensor]:
    """What a bound delta notes about each row: ids, weights, count."""
    bound = bind(model, delta)
    stop = model.card.num_layers - 1
    with torch.no_grad():
        batch = bound.embed(bound.params, bound.preprocess(queries))
        after = bound.decode(bound.params, batch, stop=stop)
    return {name.rpartition(".")[2]: note for name, note in after.routing.items()}


def pool_name(delta: Delta, part: str) -> str:
    return f"{delta.header.entries[0].name}.{part}"


def changed(delta: Delta, **parts: torch.Tensor) -> Delta:
    more = {pool_name(delta, part): tensor for part, tensor in parts.items()}
    return delta._replace(tensors={**delta.tensors, **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_experts_keeps_its_bits(family):
    model = tiny(family)
    delta, _ = sequence(model, asked(model)[:1])
    keys = delta.tensors[pool_name(delta, "vision_keys")].clone()
    keys[:, -2:] = 1  # for nothing
    shut = changed(delta, vision_keys=keys)
    assert torch.equal(logits(bind(model, shut), asked(model)), logits(model, asked(model)))
    assert not torch.equal(logits(bind(model, delta), asked(model)), logits(model, asked(model)))


@pytest.mark.parametrize("routing_input", ["query", "query_and_vision"])
def test_one_expert_weighs_the_sigmoid_of_its_score(routing_input):
    model = tiny("llava")
    config = msgspec.structs.replace(SMALL, routing_input=routing_input)
    editor = liveedit_editor(config)
    state = editor.init(model, seeded())
    delta, _ = editor.edit(model, state, asked(model)[:1])
    found = routes(model, delta, asked(model)[:1])
    assert found["count"].tolist() == [1]
    # asked by the edit's reader, which starts as the question's, features are the edit's own keys
    own = generate_experts(model, state.networks, config, asked(model)[:1])
    score = (own.query_keys**2).sum() / (config.num_query_tokens * config.feature_dim**0.5)
    torch.testing.assert_close(found["weights"][0, 0], score.sigmoid())


def test_experts_in_another_order_do_the_same():
    model = tiny("llava")
    delta, _ = sequence(model, asked(model))
    order = [2, 0, 1]
    parts = ("vision_keys", "query_keys", "down", "up")
    other = changed(delta, **{p: delta.tensors[pool_name(delta, p)][order] for p in parts})
    got, want = (logits(bind(model, one), asked(model)) for one in (other, delta))
    assert_parity(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_is_what_one_pass_gives(family):
    """The choice made at the prompt is kept for the tokens after it."""
    model = tiny(family)
    delta, _ = sequence(model, asked(model), msgspec.structs.replace(SMALL, expert_scale=1.0))
    bound = bind(model, delta)
    queries = asked(model)
    said = generate(bound, queries, 5, stop_ids=())
    assert said != generate(model, queries, 5, stop_ids=())
    inputs = bound.preprocess([query._replace(target="") for query in queries])
    batch = bound.embed(bound.params, inputs)
    last = inputs.attention_mask.sum(-1, keepdim=True) - 1
    with torch.no_grad():
        first, past = bound.decode(bound.params, batch, logit_positions=last, return_cache=True)
        tokens = first.argmax(-1)
        step = bound.embed_next(bound.params, tokens, past)
        assert step.routing
        got, _ = bound.decode(bound.params, step, kv_cache=past, return_cache=True)
    for row in range(len(queries)):
        ids = model.preprocess([queries[row]._replace(target="")])
        grown = ids._replace(
            input_ids=torch.cat([ids.input_ids, tokens[row : row + 1]], 1),
            attention_mask=torch.cat([ids.attention_mask, ids.attention_mask[:, :1]], 1),
            image_mask=torch.cat([ids.image_mask, torch.zeros_like(ids.image_mask[:, :1])], 1),
            labels=tokens[row : row + 1],
            logit_positions=last[row : row + 1],
        )
        with torch.no_grad():
            one = bound.embed(bound.params, grown)
            want = bound.decode(bound.params, one, logit_positions=last[row : row + 1] + 1)
        torch.testing.assert_close(got[row], want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_padding_are_not_seen_by_the_gate(family):
    model = tiny(family)
    delta, _ = sequence(model, asked(model))
    together = routes(model, delta, asked(model))
    for row, query in enumerate(asked(model)):
        for target in (query.target, "a much longer answer than that"):
            alone = routes(model, delta, [query._replace(target=target)])
            for name, note in alone.items():
                assert_parity(note[0], together[name][row])
    got = logits(bind(model, delta), asked(model))
    for row, query in enumerate(asked(model)):
        want = logits(bind(model, delta), [query])[0]
        torch.testing.assert_close(got[row, : len(want)], want, rtol=1e-4, atol=1e-5)


def test_an_edit_without_a_picture_reaches_questions_without_one_only():
    model = tiny("llava")
    with_image = asked(model)[:1]
    plain = [with_image[0]._replace(images=())]
    for edited, other in ((plain, with_image), (with_image, plain)):
        delta, _ = sequence(model, edited)
        bound = bind(model, delta)
        assert torch.equal(logits(bound, other), logits(model, other))
        assert not torch.equal(logits(bound, edited), logits(model, edited))


def test_the_same_question_edited_again_takes_the_experts_place():
    model = tiny("llava")
    first, second, third = asked(model)
    again = first._replace(target="cat")
    delta, _ = sequence(model, [first, second, again])
    entry = delta.header.entries[0]
    assert (entry.num_experts, entry.edit_slots) == (2, (-1, 1, 0))
    want, _ = sequence(model, [again, second])
    for part in ("vision_keys", "query_keys", "down", "up"):
        torch.testing.assert_close(
            delta.tensors[pool_name(delta, part)], want.tensors[pool_name(want, part)]
        )
    left = remove(delta, [delta.header.edits[2].id])
    assert left.header.entries[0].edit_slots == (-1, 0)
    assert torch.equal(
        logits(bind(model, left), [first]),
        logits(bind(model, select(delta, [1])), [first]),
    )
    state = liveedit_editor(SMALL).init(model, seeded())
    _, state = liveedit_editor(SMALL).edit(model, state, [first])
    side = liveedit_editor(SMALL).edit_each(model, state, [again, third])
    assert side.header.entries[0].edit_slots == (0, 1)
    for number, query in enumerate((again, third)):
        alone, _ = liveedit_editor(SMALL).edit(model, state, [query])
        got = logits(bind(model, side), [query], edit=torch.tensor([number]))
        assert_parity(got, logits(bind(model, alone), [query]))


def test_an_edit_is_sure_to_be_heard():
    """Keys are made longer by as much as the own question needs, and not where it passes."""
    model = tiny("llava")
    config = msgspec.structs.replace(SMALL, min_self_margin=0.5)
    state = liveedit_editor(config).init(model, seeded())
    plain = generate_experts(model, state.networks, SMALL, asked(model))
    sure = generate_experts(model, state.networks, config, asked(model))
    ratio = sure.vision_keys[:, :-2].norm(dim=1) / plain.vision_keys[:, :-2].norm(dim=1)
    assert (ratio > 1).any()
    assert torch.equal(sure.vision_keys[:, -2:], plain.vision_keys[:, -2:])
    assert torch.equal(sure.query_keys, plain.query_keys)
    away = state.networks.edit_features._replace(
        vision=state.networks.edit_features.vision._replace(
            value=-state.networks.edit_features.vision.value
        )
    )
    shut = state.networks._replace(edit_features=away)  # keys that point away cannot be made to fit
    assert torch.equal(
        *(generate_experts(model, shut, c, asked(model)).vision_keys for c in (SMALL, config))
    )


def test_sequences_that_part_leave_one_another_alone():
    model = tiny("llava")
    first, second, third = asked(model)
    editor = liveedit_editor(SMALL)
    delta, state = editor.edit(model, editor.init(model, seeded()), [first])
    before = {name: tensor.clone() for name, tensor in delta.tensors.items()}
    one, onward = editor.edit(model, state, [second])
    other, _ = editor.edit(model, state, [third])
    longer, _ = editor.edit(model, onward, [third])
    assert all(torch.equal(delta.tensors[name], before[name]) for name in before)
    name = pool_name(delta, "up")
    assert not torch.equal(one.tensors[name][1], other.tensors[name][1])
    assert torch.equal(longer.tensors[name][:2], one.tensors[name])
    assert longer.tensors[name].data_ptr() == one.tensors[name].data_ptr()
    assert other.tensors[name].data_ptr() != one.tensors[name].data_ptr()


def test_a_fact_removed_by_its_id_is_gone():
    model = tiny("llava")
    queries = asked(model)
    delta, _ = sequence(model, queries)
    left = remove(delta, [delta.header.edits[1].id])
    want, _ = sequence(model, [queries[0], queries[2]])
    assert left.header.entries[0].edit_slots == (0, 1)
    assert {n: t.shape for n, t in left.tensors.items()} == {
        n: t.shape for n, t in want.tensors.items()
    }
    got = logits(bind(model, left), queries)
    assert_parity(got, logits(bind(model, want), queries))
    assert not remove(delta, [0, 1, 2]).header.entries


def test_pools_are_merged_and_made_weaker():
    model = tiny("llava")
    queries = asked(model)
    one, two = (sequence(model, [query])[0] for query in queries[:2])
    both, _ = sequence(model, queries[:2])
    joined = merge(one, two)
    assert joined.header.entries[0].edit_slots == (0, 1)
    assert_parity(logits(bind(model, joined), queries), logits(bind(model, both), queries))
    later, _ = sequence(model, [queries[0]._replace(target="cat")])
    replaced = merge(one, two, later, allow_conflicts=True)
    assert replaced.header.entries[0].edit_slots == (-1, 0, 1)
    none = scale(both, 0.0)
    assert torch.equal(logits(bind(model, none), queries), logits(model, queries))
    editor = liveedit_editor(SMALL)
    other, _ = editor.edit(model, editor.init(model, seeded(1)), queries[1:2])
    with pytest.raises(InvalidInputError, match="one trained editor"):
        merge(one, other)


def test_each_row_runs_under_its_own_edit():
    model = tiny("qwen2_vl")
    queries = asked(model)
    editor = liveedit_editor(SMALL)
    delta = editor.edit_each(model, editor.init(model, seeded()), queries)
    bound = bind(model, delta)
    number = torch.tensor([2, -1, 0])
    got = logits(bound, queries, edit=number)
    alone = unstack(delta)
    want = [logits(bind(model, alone[2]), queries)[0], logits(model, queries)[1]]
    want.append(logits(bind(model, alone[0]), queries)[2])
    assert_parity(got, torch.stack(want))
    again = stack([alone[2], alone[0]])
    assert again.header == select_edits(delta, [2, 0]).header
    assert torch.equal(
        again.tensors[pool_name(again, "up")],
        select_edits(delta, [2, 0]).tensors[pool_name(again, "up")],
    )


def test_two_pools_on_one_model_keep_notes_apart():
    model = tiny("llava")
    queries = asked(model)
    one, two = (sequence(model, [query])[0] for query in queries[:2])
    bound = bind(bind(model, one), two)
    batch = bound.decode(bound.params, bound.embed(bound.params, bound.preprocess(queries)), stop=2)
    assert len(batch.routing) == 6
    with torch.no_grad():
        embedded = bound.embed(bound.params, bound.preprocess(queries))
        assert len(bound.decode(bound.params, embedded, return_cache=True)[1].routing) == 6


def test_an_edit_runs_nothing_behind_its_layer_and_no_gradient():
    model, layers = tiny("llava"), []

    def decode(params, batch, hooks: Hooks | None = None, **options):
        layers.append((batch.depth, options.get("stop")))
        return model.decode(params, batch, hooks, **options)

    editor = liveedit_editor(SMALL)
    watched = model._replace(decode=decode)
    state = editor.init(watched, seeded())
    delta = editor.edit_each(watched, state, asked(model))
    site = resolve_edit_site(model, SMALL).layer
    assert layers == [(0, site), (site, site + 1)]
    assert not any(tensor.requires_grad for tensor in delta.tensors.values())


def test_faults_of_an_entry_are_listed():
    delta, _ = sequence(tiny("llava"), asked(tiny("llava"))[:2])
    entry = delta.header.entries[0]
    assert not validate_header(delta.header)
    broken = msgspec.structs.replace(entry, num_heads=3, edit_slots=(0,), top_k=-1)
    found = validate_header(msgspec.structs.replace(delta.header, entries=(broken,)))
    assert len(found) == 3
    broken = msgspec.structs.replace(entry, rank=0, num_query_tokens=0, edit_slots=(0, 7))
    found = validate_header(msgspec.structs.replace(delta.header, entries=(broken,)))
    assert "num_query_tokens" in found[0]
    assert "rank" in found[0]
    assert "0 to 1" in found[1]


def test_the_layer_has_one_behind_it_and_sizes_fit():
    model = tiny("llava")
    last = model.card.num_layers - 1
    assert resolve_edit_site(model, LiveEditConfig(untrained=True)).layer == min(
        int(last + 1) * 2 // 3, last - 1
    )
    assert resolve_edit_site(model, LiveEditConfig(untrained=True, layer=0)).layer == 0
    for layer in (last, last + 5):
        with pytest.raises(InvalidSettingsError, match=f"0 to {last - 1}"):
            resolve_edit_site(model, LiveEditConfig(untrained=True, layer=layer))
    with pytest.raises(
        InvalidSettingsError, match="5 heads must divide the slots' width 8; 5 heads"
    ):
        liveedit_editor(LiveEditConfig(untrained=True, feature_dim=8, num_heads=5)).init(
            model, seeded()
        )
    published = configure("liveedit", preset="llava")
    assert (published.layer, published.feature_dim, published.rank, published.num_heads) == (
        21,
        1024,
        4,
        8,
    )
