"""Laws of every family: a new one gets them by one line in `adapters/families/table.py`.

Bit-equal means torch.equal; where a batch is split, matrix products run with other shapes and
rounding may differ by CLOSE, in units of logits that are about one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import functional_call, grad, vmap

from errata.functional import IGNORE_INDEX, Query
from errata.functional.errors import ShapeError, UnknownSiteError
from errata.functional.forward.activations import record_activations, zero_perturbations
from errata.functional.forward.batches import concat_batches, take_rows, tokens_before, tokens_from
from tests.adapters.zoo_of_families.models import (
    LAYERS,
    NAMES,
    VIDEO,
    made,
    make_image,
    queries,
    whole,
)

CLOSE = 1e-5
each_family = pytest.mark.parametrize("name", NAMES)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=CLOSE, atol=CLOSE)


def fresh(name):
    module, model = made(name)
    inputs = model.preprocess(queries(name))
    return module, model, inputs, model.embed(model.params, inputs)


def rows_alone(name):
    """Each query read and embedded alone."""
    model = made(name).model
    return [model.embed(model.params, model.preprocess([query])) for query in queries(name)]


@each_family
def test_decode_of_embed_is_the_hugging_face_forward(name):
    module, model, inputs, batch = fresh(name)
    got = model.decode(model.params, batch, logit_positions="all")
    assert torch.equal(
        got[inputs.attention_mask], whole(module, name, inputs)[inputs.attention_mask]
    )


@each_family
def test_rows_without_pictures_are_the_hugging_face_forward(name):
    module, model = made(name)
    inputs = model.preprocess(
        [Query("who wrote the book?", "a cat"), Query("where?", "the old town")]
    )
    batch = model.embed(model.params, inputs)
    got = model.decode(model.params, batch, logit_positions="all")
    if name in ("blip2", "minigpt4"):  # their own forward cannot run without pixels
        positions = (inputs.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        want = module.language_model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.long(),
            position_ids=positions,
        ).logits
    else:
        want = whole(module, name, inputs)
    assert torch.equal(got[inputs.attention_mask], want[inputs.attention_mask])


@pytest.mark.parametrize("name", VIDEO)
def test_video_frames_are_the_hugging_face_forward(name):
    module, model = made(name)
    frames = tuple(make_image(seed) for seed in range(4))
    film = Query("what happens?", "a red dog", frames, video=True)
    still = Query("what is in the picture?", "the chair", (make_image(9),))
    inputs = model.preprocess([film, still])
    got = model.decode(model.params, model.embed(model.params, inputs), logit_positions="all")
    assert torch.equal(
        got[inputs.attention_mask], whole(module, name, inputs)[inputs.attention_mask]
    )


@each_family
@pytest.mark.parametrize("cut", range(LAYERS))
def test_a_cut_at_any_layer_changes_nothing(name, cut):
    _, model, _, batch = fresh(name)
    half = model.decode(model.params, batch, stop=cut)
    assert half.depth == cut
    want = model.decode(model.params, batch)
    assert torch.equal(model.decode(model.params, half, start=cut), want)


@each_family
def test_thinned_rows_give_the_same_logits(name):
    _, model, inputs, batch = fresh(name)
    half = model.decode(model.params, batch, stop=LAYERS - 1)
    thin = model.select_scored(model.params, half)
    assert thin.hidden_states.shape[1] == inputs.labels.shape[1]
    want = model.decode(model.params, batch)
    close(model.decode(model.params, thin), want)
    with pytest.raises(ShapeError, match="before the last layer"):
        model.select_scored(model.params, batch)


@each_family
def test_a_thinned_row_follows_changes_behind_the_attention(name):
    _, model, _, batch = fresh(name)
    half = model.decode(model.params, batch, stop=LAYERS - 1)
    thin = model.select_scored(model.params, half)
    weight = f"{model.card.resolve_site('layers.-1.mlp.down')}.weight"
    changed = {**model.params, weight: model.params[weight] * 1.5}
    want = model.decode(changed, batch)
    assert not torch.allclose(want, model.decode(model.params, batch))
    close(model.decode(changed, thin), want)


@each_family
def test_vmap_over_weights_is_a_loop(name):
    _, model, _, batch = fresh(name)
    weight = f"{model.card.resolve_site('layers.1.mlp.down')}.weight"
    stack = torch.stack([model.params[weight] * scale for scale in (0.5, 1.0, 2.0)])

    def run(value):
        return model.decode({**model.params, weight: value}, batch)

    close(vmap(run)(stack), torch.stack([run(value) for value in stack]))


@each_family
def test_vmap_over_rows_is_a_loop(name):
    _, model, _, batch = fresh(name)

    def run(plain, extras):
        one = batch._replace(**plain, layer_inputs=extras)
        lone = {key: value[None] for key, value in plain.items()}
        one = one._replace(**lone, layer_inputs={key: value[None] for key, value in extras.items()})
        return model.decode(model.params, one)[0]

    plain = {
        k: v for k, v in batch._asdict().items() if k not in ("layer_inputs", "depth", "routing")
    }
    close(vmap(run)(plain, dict(batch.layer_inputs)), model.decode(model.params, batch))


@each_family
def test_padding_and_company_change_nothing(name):
    _, model, inputs, batch = fresh(name)
    want = model.decode(model.params, batch)
    alone = rows_alone(name)
    joined = model.decode(model.params, concat_batches(alone))
    scored = inputs.labels != IGNORE_INDEX
    close(joined[scored], want[scored])
    for row, single in enumerate(alone):
        keep = single.labels[0] != IGNORE_INDEX
        got = model.decode(model.params, single)[0, keep]
        close(got, want[row][scored[row]])
    back = take_rows(batch, torch.tensor([len(alone) - 1, 0]))
    close(model.decode(model.params, back), want[[-1, 0]])


@each_family
def test_an_identity_rewrite_changes_nothing_and_no_rewrite_stays(name):
    _, model, inputs, batch = fresh(name)
    card = model.card
    sites = [
        card.resolve_site("layers.1"),
        card.resolve_site("layers.-1.attn"),
        card.resolve_site("layers.0.mlp.down"),
    ]
    same = {site: lambda given, out: out for site in (*sites, card.norm or card.head)}
    want = model.decode(model.params, batch)
    assert torch.equal(model.decode(model.params, batch, same), want)
    loud = {card.resolve_site("layers.0.mlp.down"): lambda given, out: out + 1}
    assert not torch.allclose(model.decode(model.params, batch, loud), want)
    assert torch.equal(model.decode(model.params, batch), want)
    seen = model.embed(model.params, inputs, {card.token_embedding: lambda given, out: out * 2})
    assert not torch.allclose(seen.hidden_states, batch.hidden_states)
    with pytest.raises(UnknownSiteError, match="no 'nowhere'"):
        model.decode(model.params, batch, {"nowhere": lambda given, out: out})
    with pytest.raises(UnknownSiteError, match="no 'nowhere'"):
        model.embed(model.params, inputs, {"nowhere": lambda given, out: out})


@each_family
def test_a_cut_in_time_changes_nothing(name):
    _, model, inputs, batch = fresh(name)
    want = model.decode(model.params, batch)
    scored = inputs.labels != IGNORE_INDEX
    t = int(inputs.logit_positions[scored].min())
    first, past = model.decode(
        model.params, tokens_before(batch, t), stop=LAYERS - 1, return_cache=True
    )
    assert first.depth == LAYERS - 1
    assert len(past.keys) == LAYERS - 1
    _, past = model.decode(model.params, tokens_before(batch, t), return_cache=True)
    rest = tokens_from(batch, t)
    got, longer = model.decode(model.params, rest, kv_cache=past, return_cache=True)
    close(got[scored], want[scored])
    assert torch.equal(longer.attention_mask, batch.attention_mask)
    real = batch.position_ids.masked_fill(~batch.attention_mask[:, None], -1)
    assert torch.equal(longer.next_position[:, 0], real.amax((1, 2)) + 1)
    half = model.decode(model.params, rest, kv_cache=past, stop=LAYERS - 1)
    close(model.decode(model.params, half, kv_cache=past)[scored], want[scored])
    thin = model.select_scored(model.params, half, kv_cache=past)
    close(model.decode(model.params, thin)[scored], want[scored])


@each_family
def test_going_on_from_a_past_is_the_longer_row(name):
    """Rows of different lengths continue by two tokens, one by one, as generation does."""
    module, model, _, _ = fresh(name)
    asked = [query._replace(target="") for query in queries(name)]
    inputs = model.preprocess(asked)
    batch = model.embed(model.params, inputs)
    _, past = model.decode(model.params, batch, return_cache=True)
    new = torch.tensor([[40 + row, 60 + row] for row in range(len(asked))])
    steps = []
    for column in new.T:
        step = model.embed_next(model.params, column[:, None], past)
        logits, past = model.decode(model.params, step, kv_cache=past, return_cache=True)
        steps.append(logits[:, 0])
    got = torch.stack(steps, 1)
    for row, query in enumerate(asked):
        one = model.preprocess([query])
        ids = torch.cat([one.input_ids, new[row : row + 1]], 1)
        more = torch.zeros(1, 2, dtype=torch.bool)
        long = one._replace(
            input_ids=ids,
            attention_mask=torch.cat([one.attention_mask, ~more], 1),
            image_mask=torch.cat([one.image_mask, more], 1),
        )
        if "mm_token_type_ids" in long.vision_inputs:
            kinds = torch.cat([one.vision_inputs["mm_token_type_ids"], more.long()], 1)
            long = long._replace(vision_inputs={**long.vision_inputs, "mm_token_type_ids": kinds})
        if name in ("blip2", "minigpt4") and not query.images:
            want = model.decode(
                model.params, model.embed(model.params, long), logit_positions="all"
            )
        else:
            want = whole(module, name, long)
        close(got[row], want[0, -2:])


@each_family
def test_labels_cover_exactly_the_target(name):
    model = made(name).model
    asked = queries(name)
    inputs = model.preprocess(asked)
    for row, query in enumerate(asked):
        keep = inputs.labels[row] != IGNORE_INDEX
        labels, at = inputs.labels[row, keep], inputs.logit_positions[row, keep]
        assert torch.equal(inputs.input_ids[row, at + 1], labels)
        assert torch.equal(at, torch.arange(int(at[0]), int(at[0]) + len(at)))
        assert model.detokenize(labels.tolist()).strip() == query.target
        assert inputs.attention_mask[row].sum() - 1 == at[-1] + 1
        assert not inputs.image_mask[row, at].any() or name == "blip2"


@each_family
def test_the_base_is_never_written(name):
    module, model, inputs, batch = fresh(name)
    tensors = [*module.parameters(), *module.buffers()]
    versions, copies = [t._version for t in tensors], [t.clone() for t in tensors]
    plain = {path: dict(vars(part)) for path, part in module.named_modules()}
    site = model.card.resolve_site("layers.1.mlp.down")
    changed = {**model.params, f"{site}.weight": model.params[f"{site}.weight"] * 2}
    batch = model.embed(changed, inputs, {model.card.token_embedding: lambda given, out: out * 2})
    _, past = model.decode(changed, batch, {site: lambda given, out: out * 2}, return_cache=True)
    model.embed_next(changed, inputs.input_ids[:, :1], past)
    half = model.decode(changed, batch, stop=LAYERS - 1)
    model.select_scored(changed, half)
    assert versions == [t._version for t in tensors]
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies))
    assert all(p.data_ptr() == model.params[n].data_ptr() for n, p in module.named_parameters())
    skeleton = model.decode.__self__.runner.replica()
    assert all(a is b for a, b in zip(skeleton.parameters(), module.parameters()))
    for path, part in module.named_modules():
        assert vars(part).keys() == plain[path].keys()
        assert all(vars(part)[key] is value for key, value in plain[path].items())


@each_family
def test_nothing_leaks_from_call_to_call(name):
    _, model, inputs, batch = fresh(name)
    text = model.preprocess([Query("where?", "a cat")])
    before = model.embed(model.params, text)
    model.embed(model.params, inputs)
    after = model.embed(model.params, text)
    assert torch.equal(before.hidden_states, after.hidden_states)
    assert torch.equal(before.position_ids, after.position_ids)
    assert before.layer_inputs.keys() == after.layer_inputs.keys()
    assert all(
        torch.equal(value, after.layer_inputs[key]) for key, value in before.layer_inputs.items()
    )


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "blip2", "gpt2"])
def test_eight_threads_are_serial(name):
    _, model, inputs, _ = fresh(name)
    weight = f"{model.card.resolve_site('layers.2.mlp.down')}.weight"
    site = model.card.resolve_site("layers.1.mlp.down")

    def run(number):
        changed = {**model.params, weight: model.params[weight] * (1 + number)}
        batch = model.embed(changed, inputs)
        return model.decode(changed, batch, {site: lambda given, out: out * number})

    serial = [run(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            for want, got in zip(serial, pool.map(run, range(8))):
                assert torch.equal(want, got)


@each_family
def test_probes_give_the_weight_gradient(name):
    """einsum(delta, u) of a tap is the gradient autograd finds for the weight."""
    _, model, inputs, batch = fresh(name)
    site = model.card.resolve_linear("layers.2.mlp.down")
    weight = f"{site}.weight"

    def score(logits):
        picked = logits.log_softmax(-1).gather(-1, inputs.labels.clamp(min=0)[..., None])[..., 0]
        return (picked * (inputs.labels != IGNORE_INDEX)).sum()

    def by_weight(value):
        return score(model.decode({**model.params, weight: value}, batch))

    def by_probe(probes):
        logits, taps = record_activations(
            model.decode, model.params, batch, [site], perturbations=probes
        )
        return score(logits), taps[site].input

    delta, given = grad(by_probe, has_aux=True)(zero_perturbations(model.card, batch, [site]))
    given = given.reshape(*delta[site].shape[:2], -1)
    product = torch.einsum("bto,bti->oi", delta[site], given)
    want = grad(by_weight)(model.params[weight])
    product = product.T if site in model.card.transposed else product
    torch.testing.assert_close(product, want, rtol=1e-4, atol=1e-5)


@each_family
def test_linear_maps_have_the_sizes_of_the_card(name):
    module, model = made(name)
    for path, (out, width) in model.card.linear_shapes.items():
        part = module.get_submodule(path)
        bias = torch.zeros(out)
        x = torch.zeros(1, width)
        own = {"bias": bias} if part.bias is not None else {}
        assert functional_call(part, own, (x,)).shape == (1, out)
