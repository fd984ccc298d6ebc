"""SERAC: what its gate sees, what it leaves alone, how its memory grows and shrinks."""

from __future__ import annotations

import msgspec
import pytest
import torch
from PIL import Image

from errata import adapters
from errata.editors.liveedit.config import LiveEditConfig
from errata.editors.liveedit.editor import liveedit_editor
from errata.editors.serac.config import SeracConfig
from errata.editors.serac.editor import (
    serac_editor,
    unembedding_map,
)
from errata.functional import Query, bind_rows, generate, merge, remove, scale
from errata.functional.binding.bound_model import bind
from errata.functional.deltas import serialization
from errata.functional.deltas.stacking import stack, unstack
from errata.functional.errors import InvalidInputError, UnsupportedKindError
from errata.functional.forward import batches
from errata.functional.gradients.losses import nll
from errata.functional.kinds.scope.apply import logits_from_states, mix_logits
from errata.functional.kinds.scope.network import classify_scope, network_inputs

SMALL = {
    "dim": 32,
    "num_heads": 4,
    "num_classifier_layers": 1,
    "num_counterfactual_layers": 2,
    "ffn_dim": 32,
    "key_dim": 16,
}
HARD = SeracConfig(untrained=True, **SMALL)
SOFT = SeracConfig(untrained=True, gate="soft", **SMALL)
ASKED = ["who is it?", "where does it live now?", "what does it eat?", "what colour is the chair?"]


def tiny(name: str = "llava"):
    return adapters.from_module(*adapters.tiny_model(name))


def query(number: int, target: str = "bo", shade: int | None = None) -> Query:
    shade = 50 * number if shade is None else shade
    image = Image.new("RGB", (32, 32), (shade, 255 - shade, 40))
    return Query(ASKED[number % len(ASKED)], target, (image,))


def edited(model, config: SeracConfig, queries):
    editor = serac_editor(config)
    delta, state = editor.edit(model, editor.init(model, torch.Generator().manual_seed(0)), queries)
    return delta, state


def embedded(model, queries, **options):
    return model.embed(model.params, model.preprocess(queries, **options))


def share_of(bound, batch) -> torch.Tensor:
    """The similarity that the bound model decided by."""
    _, past = bound.decode(bound.params, batch, return_cache=True)
    (found,) = (note for name, note in past.routing.items() if name.endswith(".share"))
    return found


def test_a_soft_gate_mixes_the_two_answers_by_the_similarity():
    model, near = tiny(), query(0)._replace(prompt="who is this?")
    delta, state = edited(model, SOFT, [query(0, "owl")])
    # brought near, so that the mixture is one
    small = {
        n: t * 0.5 if n.endswith((".image_to_key", ".text_to_key", ".keys")) else t
        for n, t in delta.tensors.items()
    }
    bound = bind(model, delta._replace(tensors=small))
    batch = embedded(model, [near])
    keys = classify_scope(state.network, 4, network_inputs(state.network, batch)) * 0.5
    gap = (keys - small[f"{delta.header.entries[0].name}.keys"]).square().sum()
    share = torch.exp(-gap)
    assert 0.05 < share < 0.999
    torch.testing.assert_close(share_of(bound, batch)[0], share)
    entry = delta.header.entries[0]
    always = msgspec.structs.replace(entry, gate="hard", threshold=0.0)
    header = msgspec.structs.replace(delta.header, entries=(always,))
    other = bind(model, delta._replace(header=header, tensors=small))
    f = model.decode(model.params, batch)
    c = other.decode(other.params, batch)
    want = torch.log((1 - share) * f.softmax(-1) + share * c.softmax(-1))
    torch.testing.assert_close(bound.decode(bound.params, batch), want, rtol=1e-4, atol=1e-4)


def test_a_mixture_is_finite_at_its_ends():
    f, c = torch.randn(3, 1, 5), torch.randn(3, 1, 5)
    found = mix_logits(f, c, torch.tensor([[0.0], [1.0], [0.3]]))
    assert torch.equal(found[0], f[0])
    torch.testing.assert_close(found[1], c[1].log_softmax(-1), rtol=1e-5, atol=1e-5)
    share = torch.tensor([1.0], requires_grad=True)
    assert torch.autograd.grad(mix_logits(f, c, share.expand(3, 1)).sum(), share)[0].isfinite()


@pytest.mark.parametrize("config", [HARD, SOFT], ids=["hard", "soft"])
def test_the_gate_never_sees_the_answer(config):
    """Neither the edit's target nor the answer that is scored moves a key or a similarity."""
    model = tiny()
    deltas = [edited(model, config, [query(0, target)])[0] for target in ("bo", "in a town")]
    name = deltas[0].header.entries[0].name
    keys = [delta.tensors[f"{name}.keys"] for delta in deltas]
    torch.testing.assert_close(*keys, rtol=0, atol=1e-5)
    bound = bind(model, deltas[0])
    asked = [query(1, target, 0) for target in ("owl", "where the river and the mountain are")]
    shares = [share_of(bound, embedded(model, [one])) for one in asked]
    torch.testing.assert_close(*shares, rtol=1e-4, atol=1e-6)


def test_out_of_scope_a_hard_gate_leaves_every_bit():
    model = tiny()
    sure = msgspec.structs.replace(HARD, threshold=0.95)  # an untrained gate tells little apart
    bound = bind(model, edited(model, sure, [query(0), query(1)])[0])
    asked = [query(2), query(3), Query("is water wet?", "yes")]
    batch = embedded(model, asked)
    assert bool((share_of(bound, batch) < 0.95).all())
    assert torch.equal(bound.decode(bound.params, batch), model.decode(model.params, batch))
    inside = embedded(model, [query(0)])
    first = int(inside.prompt_end.int().argmax())
    every = [m.decode(m.params, inside, logit_positions="all") for m in (bound, model)]
    assert torch.equal(every[0][:, :first], every[1][:, :first])  # up to the prompt's last token
    assert not torch.equal(every[0][:, first:], every[1][:, first:])


@pytest.mark.parametrize("name", ["llava", "blip2", "qwen2_vl", "gpt2"])
def test_token_by_token_is_one_pass(name):
    """Generation with the cache, and a cut in the middle of the prompt, see the same scope."""
    model = tiny(name)
    asked = [query(0, "in a town"), query(1, "bo the old owl")]
    asked = asked if model.card.takes_images else [one._replace(images=()) for one in asked]
    bound = bind(model, edited(model, SOFT, asked[:1])[0])
    bare = [one._replace(target="") for one in asked]
    assert generate(bound, bare[:1], 8)[0].strip().startswith("in a town")
    batch = embedded(bound, asked)
    whole = bound.decode(bound.params, batch)
    cut = int(batch.prompt_end.int().argmax(1).min()) - 2
    before, after = batches.tokens_before(batch, cut), batches.tokens_from(batch, cut)
    _, past = bound.decode(
        bound.params, before, logit_positions=before.logit_positions[:, :1], return_cache=True
    )
    scored = batch.labels != -100
    parted = bound.decode(bound.params, after, kv_cache=past)
    torch.testing.assert_close(parted[scored], whole[scored], rtol=1e-4, atol=1e-4)
    prompt = embedded(bound, bare)
    last = prompt.attention_mask.sum(1, keepdim=True) - 1
    logits, past = bound.decode(bound.params, prompt, logit_positions=last, return_cache=True)
    for t in range(int(scored.all(0).sum())):
        torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
        new = bound.embed_next(bound.params, batch.labels[:, t : t + 1], past)
        logits, past = bound.decode(bound.params, new, kv_cache=past, return_cache=True)


def test_a_batch_it_has_not_seen_from_below_is_refused():
    model = tiny()
    bound = bind(model, edited(model, HARD, [query(0)])[0])
    batch = embedded(model, [query(0), query(2)])
    whole = bound.decode(bound.params, batch)
    half = bound.decode(bound.params, batch, stop=2)
    assert torch.equal(bound.decode(bound.params, half), whole)
    deep = bound.decode(bound.params, batch, stop=model.card.num_layers - 1)
    thinned = bound.select_scored(bound.params, deep)
    torch.testing.assert_close(bound.decode(bound.params, thinned), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInputError, match="batches at depth 0"):
        bound.decode(bound.params, model.decode(model.params, batch, stop=2))


def test_deltas_above_and_below_keep_their_notes():
    """LiveEdit chooses experts at the prompt and keeps the choice, as the gate does."""
    model = tiny()
    delta, _ = edited(model, HARD, [query(0, "in a town")])
    experts = liveedit_editor(LiveEditConfig(untrained=True))
    other, _ = experts.edit(
        model, experts.init(model, torch.Generator().manual_seed(0)), [query(1)]
    )
    for bound in (bind(bind(model, delta), other), bind(bind(model, other), delta)):
        batch = embedded(bound, [query(0, "in a town"), query(1, "in a town")])
        whole = bound.decode(bound.params, batch)
        prompt = embedded(bound, [query(0, ""), query(1, "")])
        last = prompt.attention_mask.sum(1, keepdim=True) - 1
        logits, past = bound.decode(bound.params, prompt, logit_positions=last, return_cache=True)
        assert any(".scope." in name for name in past.routing)
        assert any(".scope." not in name for name in past.routing)
        for t in range(3):
            torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
            new = bound.embed_next(bound.params, batch.labels[:, t : t + 1], past)
            logits, past = bound.decode(bound.params, new, kv_cache=past, return_cache=True)


def test_deltas_one_on_another_and_side_by_side_keep_to_their_own_memory():
    model = tiny()
    config = msgspec.structs.replace(HARD, threshold=0.9)
    # answers of other lengths, so that what is kept of a question is of other widths
    made = [query(0, "in a town"), query(2, "bo")]
    one, two = (edited(model, config, [edit])[0] for edit in made)
    both = bind(bind(model, one), two)
    batch = embedded(model, made)
    apart = torch.cat(
        [
            bind(model, delta).decode(model.params, batches.take_rows(batch, slice(n, n + 1)))
            for n, delta in enumerate((one, two))
        ]
    )
    torch.testing.assert_close(both.decode(both.params, batch), apart, rtol=1e-3, atol=1e-3)
    bare = [edit._replace(target="") for edit in (*made, query(1))]
    said = generate(both, bare[:2], 8)
    assert [text.strip().split("\0")[0] for text in said] == ["in a town", "bo"]
    mixed_rows = bind_rows(model, [one, two], [0, 1, -1])
    want = [*said, *generate(model, bare[2:], 8)]
    assert generate(mixed_rows, bare, 8) == want
    batch = embedded(mixed_rows, [*made, query(1)])
    whole = mixed_rows.decode(mixed_rows.params, batch)
    half = mixed_rows.decode(mixed_rows.params, batch, stop=2)
    torch.testing.assert_close(mixed_rows.decode(mixed_rows.params, half), whole)


def test_company_and_padding_change_nothing():
    model = tiny()
    delta, _ = edited(model, SOFT, [query(0), query(1, "in a town")])
    bound = bind(model, delta)
    asked = [query(0), query(1, "owl"), Query("is the chair in the city of the lake?", "yes")]
    batch = embedded(model, asked)
    together = bound.decode(bound.params, batch)
    for number, one in enumerate(asked):
        alone = bound.decode(bound.params, embedded(model, [one]))
        wide = bound.decode(bound.params, batches.pad_batch(embedded(model, [one]), 90))
        got = together[number, : alone.shape[1]]
        torch.testing.assert_close(got, alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(wide, alone, rtol=1e-4, atol=1e-4)


def test_an_edit_runs_no_layer_and_encodes_nothing_twice():
    """Only norm and head are read, for the answer's tokens; a question never re-encodes memory."""
    model, depths = tiny(), []

    def decode(params, batch, *args, **options):
        depths.append(batch.depth)
        return model.decode(params, batch, *args, **options)

    embeds = []

    def embed(params, inputs, *args, **options):
        embeds.append(len(inputs.input_ids))
        return model.embed(params, inputs, *args, **options)

    counted = model._replace(decode=decode, embed=embed)
    editor = serac_editor(HARD)
    state = editor.init(counted, torch.Generator().manual_seed(0))
    for number in range(3):
        delta, state = editor.edit(counted, state, [query(number)])
    assert set(depths) == {model.card.num_layers}
    assert embeds == [1, 1, 1]
    depths.clear()
    bound = bind(counted, delta)
    bound.decode(bound.params, embedded(model, [query(3)]))
    assert depths == [0, model.card.num_layers]


def test_each_of_many_edits_is_found():
    model = tiny()
    targets = ["bo", "owl", "in a town", "the red cat", "yes"]
    made = [query(n, targets[n % 5], 21 * n) for n in range(12)]
    delta, state = edited(model, HARD, made)
    bound = bind(model, delta)
    batch = embedded(model, made, append_eos=True)
    assert bool((share_of(bound, batch) > 0.99).all())
    losses = nll(bound.decode(bound.params, batch), batch.labels)
    assert float(losses.max()) < float(nll(model.decode(model.params, batch), batch.labels).min())
    assert state.edit_slots == tuple(range(12))
    # a slot holds kilobytes
    name = delta.header.entries[0].name
    own = sum(
        t.numel() * t.element_size()
        for n, t in delta.tensors.items()
        if n not in delta.header.entries[0].shared_tensors()
    )
    assert own / 12 < 8 * 1024
    assert delta.tensors[f"{name}.keys"].shape == (12, 32)


def test_the_same_question_again_replaces_its_edit():
    model = tiny()
    editor = serac_editor(HARD)
    state = editor.init(model, torch.Generator().manual_seed(0))
    _, state = editor.edit(model, state, [query(0, "bo"), query(1, "owl")])
    again = editor.edit_each(model, state, [query(0, "in a town"), query(2, "yes")])
    delta, state = editor.edit(model, state, [query(0, "in a town")])
    assert state.edit_slots == (-1, 1, 0)
    assert delta.header.entries[0].num_slots == 2
    for bound in (bind(model, delta), bind(model, unstack(again)[0])):
        said = generate(bound, [query(0, ""), query(1, "")], 8)
        assert said[0].strip().startswith("in a town")
        assert said[1].strip().startswith("owl")
    with pytest.raises(InvalidInputError, match="edit the same question"):
        merge(
            edited(model, HARD, [query(0)])[0],
            edited(model, HARD, [query(0, "owl")])[0],
            allow_conflicts=True,
        )


def test_edits_are_merged_removed_stacked_and_saved(tmp_path):
    model = tiny()
    editor = serac_editor(HARD)
    state = editor.init(model, torch.Generator().manual_seed(0))
    made = [query(0, "bo"), query(1, "the old owl"), query(2, "yes")]
    single = [editor.edit(model, state, [one])[0] for one in made]
    whole, _ = editor.edit(model, state, made)
    joined = merge(*single)
    assert joined.header == whole.header
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(joined.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    left = remove(joined, [1])
    want = merge(single[0], single[2])
    assert left.header == want.header
    assert all(torch.equal(left.tensors[n], t) for n, t in want.tensors.items())
    bound = bind(model, left)
    batch = embedded(model, made)
    assert torch.equal(share_of(bound, batch) > 0.99, torch.tensor([True, False, True]))
    assert not remove(joined, [0, 1, 2]).header.entries
    serialization.save_delta(tmp_path / "three.safetensors", whole)
    assert serialization.load_delta(tmp_path / "three.safetensors").header == whole.header
    with pytest.raises(UnsupportedKindError, match="has no half"):
        scale(whole, 0.5)
    other = serac_editor(HARD)
    foreign, _ = other.edit(model, other.init(model, torch.Generator().manual_seed(1)), made[:1])
    with pytest.raises(InvalidInputError, match="different classifiers"):
        merge(single[1], foreign)
    pair = stack([single[0], single[2]]) if _alike(single) else None
    both = pair or editor.edit_each(model, state, [made[0], made[2]])
    bound = bind(model, both)
    asked = embedded(model, [made[0], made[0]])._replace(edit_index=torch.tensor([0, -1]))
    logits = bound.decode(bound.params, asked)
    base = model.decode(model.params, asked)
    assert torch.equal(logits[1], base[1])
    assert not torch.equal(logits[0], base[0])


def _alike(deltas) -> bool:
    first, last = deltas[0].tensors, deltas[2].tensors
    return all(first[name].shape == last[name].shape for name in first)


def test_an_answer_is_read_as_itself():
    """Every word of the vocabulary, by the model's own norm and head."""
    for name in ("llava", "blip2"):
        model = adapters.load_micro(name)
        reader = unembedding_map(model)
        ids = torch.arange(model.card.vocab_size)
        zero = torch.zeros(1, len(ids), model.card.hidden_size)
        none = torch.zeros(1, dtype=torch.long)

        def lead(hidden, model=model, none=none, ids=ids):
            logits = logits_from_states(model, model.params, hidden, none)[0]
            return (logits.gather(1, ids[:, None])[:, 0] - logits.mean(-1)).sum()

        stream = torch.func.grad(lead)(zero) @ reader
        read = logits_from_states(model, model.params, stream, none)[0].argmax(-1)
        assert torch.equal(read, ids)
