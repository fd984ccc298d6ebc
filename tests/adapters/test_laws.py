"""Laws every family keeps, pooled: a new family gets them by one line in `adapters/tiny.py`.

Bit-equal means torch.equal; where a batch is split, matrix products run with other shapes and
rounding may differ by CLOSE, in units of logits that are about one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import functional_call, grad, vmap

from errata.adapters import core, structure
from errata.adapters.families import family_of
from errata.adapters.tiny import tiny
from errata.functional import IGNORE, Inputs, Query
from errata.functional.errors import ModelUnsupported, ShapeMismatch, UnknownSite
from errata.functional.rows import concat, earlier, later, take
from errata.functional.taps import tap, zeros
from tests.adapters.models import LAYERS, NAMES, VIDEO, made, picture, queries, whole

CLOSE = 1e-5
each_family = pytest.mark.parametrize("name", NAMES)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=CLOSE, atol=CLOSE)


def fresh(name):
    module, model = made(name)
    inputs = model.read(queries(name))
    return module, model, inputs, model.embed(model.params, inputs)


def rows_alone(name):
    """Each query read and embedded alone."""
    model = made(name).model
    return [model.embed(model.params, model.read([query])) for query in queries(name)]


@each_family
def test_decode_of_embed_is_the_hugging_face_forward(name):
    module, model, inputs, batch = fresh(name)
    got = model.decode(model.params, batch, at="all")
    assert torch.equal(got[inputs.mask], whole(module, name, inputs)[inputs.mask])


@each_family
def test_rows_without_pictures_are_the_hugging_face_forward(name):
    module, model = made(name)
    inputs = model.read([Query("who wrote the book?", "a cat"), Query("where?", "the old town")])
    batch = model.embed(model.params, inputs)
    got = model.decode(model.params, batch, at="all")
    if name in ("blip2", "minigpt4"):  # their own forward can not run without pixels
        positions = (inputs.mask.long().cumsum(-1) - 1).clamp(min=0)
        want = module.language_model(
            input_ids=inputs.ids, attention_mask=inputs.mask.long(), position_ids=positions
        ).logits
    else:
        want = whole(module, name, inputs)
    assert torch.equal(got[inputs.mask], want[inputs.mask])


@pytest.mark.parametrize("name", VIDEO)
def test_video_frames_are_the_hugging_face_forward(name):
    module, model = made(name)
    frames = tuple(picture(seed) for seed in range(4))
    film = Query("what happens?", "a red dog", frames, video=True)
    still = Query("what is in the picture?", "the chair", (picture(9),))
    inputs = model.read([film, still])
    got = model.decode(model.params, model.embed(model.params, inputs), at="all")
    assert torch.equal(got[inputs.mask], whole(module, name, inputs)[inputs.mask])


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
    thin = model.thin(model.params, half)
    assert thin.hidden.shape[1] == inputs.labels.shape[1]
    want = model.decode(model.params, batch)
    close(model.decode(model.params, thin), want)
    with pytest.raises(ShapeMismatch, match="before the last layer"):
        model.thin(model.params, batch)


@each_family
def test_a_thinned_row_follows_changes_behind_the_attention(name):
    _, model, _, batch = fresh(name)
    half = model.decode(model.params, batch, stop=LAYERS - 1)
    thin = model.thin(model.params, half)
    weight = f"{model.card.site('layers.-1.mlp.down')}.weight"
    changed = {**model.params, weight: model.params[weight] * 1.5}
    want = model.decode(changed, batch)
    assert not torch.allclose(want, model.decode(model.params, batch))
    close(model.decode(changed, thin), want)


@each_family
def test_vmap_over_weights_is_a_loop(name):
    _, model, _, batch = fresh(name)
    weight = f"{model.card.site('layers.1.mlp.down')}.weight"
    stack = torch.stack([model.params[weight] * scale for scale in (0.5, 1.0, 2.0)])

    def run(value):
        return model.decode({**model.params, weight: value}, batch)

    close(vmap(run)(stack), torch.stack([run(value) for value in stack]))


@each_family
def test_vmap_over_rows_is_a_loop(name):
    _, model, _, batch = fresh(name)

    def run(plain, extras):
        one = batch._replace(**plain, extras=extras)
        lone = {key: value[None] for key, value in plain.items()}
        one = one._replace(**lone, extras={key: value[None] for key, value in extras.items()})
        return model.decode(model.params, one)[0]

    plain = {k: v for k, v in batch._asdict().items() if k not in ("extras", "depth", "notes")}
    close(vmap(run)(plain, dict(batch.extras)), model.decode(model.params, batch))


@each_family
def test_padding_and_company_change_nothing(name):
    _, model, inputs, batch = fresh(name)
    want = model.decode(model.params, batch)
    alone = rows_alone(name)
    joined = model.decode(model.params, concat(alone))
    scored = inputs.labels != IGNORE
    close(joined[scored], want[scored])
    for row, single in enumerate(alone):
        keep = single.labels[0] != IGNORE
        got = model.decode(model.params, single)[0, keep]
        close(got, want[row][scored[row]])
    back = take(batch, torch.tensor([len(alone) - 1, 0]))
    close(model.decode(model.params, back), want[[-1, 0]])


@each_family
def test_an_identity_rewrite_changes_nothing_and_no_rewrite_stays(name):
    _, model, inputs, batch = fresh(name)
    card = model.card
    sites = [card.site("layers.1"), card.site("layers.-1.attn"), card.site("layers.0.mlp.down")]
    same = {site: lambda given, out: out for site in (*sites, card.norm or card.head)}
    want = model.decode(model.params, batch)
    assert torch.equal(model.decode(model.params, batch, same), want)
    loud = {card.site("layers.0.mlp.down"): lambda given, out: out + 1}
    assert not torch.allclose(model.decode(model.params, batch, loud), want)
    assert torch.equal(model.decode(model.params, batch), want)
    seen = model.embed(model.params, inputs, {card.tokens: lambda given, out: out * 2})
    assert not torch.allclose(seen.hidden, batch.hidden)
    with pytest.raises(UnknownSite, match="no 'nowhere'"):
        model.decode(model.params, batch, {"nowhere": lambda given, out: out})
    with pytest.raises(UnknownSite, match="no 'nowhere'"):
        model.embed(model.params, inputs, {"nowhere": lambda given, out: out})


@each_family
def test_a_cut_in_time_changes_nothing(name):
    _, model, inputs, batch = fresh(name)
    want = model.decode(model.params, batch)
    scored = inputs.labels != IGNORE
    t = int(inputs.at[scored].min())
    first, past = model.decode(model.params, earlier(batch, t), stop=LAYERS - 1, keep=True)
    assert first.depth == LAYERS - 1
    assert len(past.keys) == LAYERS - 1
    _, past = model.decode(model.params, earlier(batch, t), keep=True)
    rest = later(batch, t)
    got, longer = model.decode(model.params, rest, past=past, keep=True)
    close(got[scored], want[scored])
    assert torch.equal(longer.mask, batch.mask)
    real = batch.positions.masked_fill(~batch.mask[:, None], -1)
    assert torch.equal(longer.next[:, 0], real.amax((1, 2)) + 1)
    half = model.decode(model.params, rest, past=past, stop=LAYERS - 1)
    close(model.decode(model.params, half, past=past)[scored], want[scored])
    thin = model.thin(model.params, half, past=past)
    close(model.decode(model.params, thin)[scored], want[scored])


@each_family
def test_going_on_from_a_past_is_the_longer_row(name):
    """Rows of different lengths go on by two tokens, one by one, as generation does."""
    module, model, _, _ = fresh(name)
    asked = [query._replace(target="") for query in queries(name)]
    inputs = model.read(asked)
    batch = model.embed(model.params, inputs)
    _, past = model.decode(model.params, batch, keep=True)
    new = torch.tensor([[40 + row, 60 + row] for row in range(len(asked))])
    steps = []
    for column in new.T:
        step = model.extend(model.params, column[:, None], past)
        logits, past = model.decode(model.params, step, past=past, keep=True)
        steps.append(logits[:, 0])
    got = torch.stack(steps, 1)
    for row, query in enumerate(asked):
        one = model.read([query])
        ids = torch.cat([one.ids, new[row : row + 1]], 1)
        more = torch.zeros(1, 2, dtype=torch.bool)
        long = one._replace(
            ids=ids, mask=torch.cat([one.mask, ~more], 1), image=torch.cat([one.image, more], 1)
        )
        if "mm_token_type_ids" in long.pixels:
            kinds = torch.cat([one.pixels["mm_token_type_ids"], more.long()], 1)
            long = long._replace(pixels={**long.pixels, "mm_token_type_ids": kinds})
        if name in ("blip2", "minigpt4") and not query.images:
            want = model.decode(model.params, model.embed(model.params, long), at="all")
        else:
            want = whole(module, name, long)
        close(got[row], want[0, -2:])


@each_family
def test_labels_cover_exactly_the_target(name):
    model = made(name).model
    asked = queries(name)
    inputs = model.read(asked)
    for row, query in enumerate(asked):
        keep = inputs.labels[row] != IGNORE
        labels, at = inputs.labels[row, keep], inputs.at[row, keep]
        assert torch.equal(inputs.ids[row, at + 1], labels)
        assert torch.equal(at, torch.arange(int(at[0]), int(at[0]) + len(at)))
        assert model.write(labels.tolist()).strip() == query.target
        assert inputs.mask[row].sum() - 1 == at[-1] + 1
        assert not inputs.image[row, at].any() or name == "blip2"


@each_family
def test_the_base_is_never_written(name):
    module, model, inputs, batch = fresh(name)
    tensors = [*module.parameters(), *module.buffers()]
    versions, copies = [t._version for t in tensors], [t.clone() for t in tensors]
    plain = {path: dict(vars(part)) for path, part in module.named_modules()}
    site = model.card.site("layers.1.mlp.down")
    changed = {**model.params, f"{site}.weight": model.params[f"{site}.weight"] * 2}
    batch = model.embed(changed, inputs, {model.card.tokens: lambda given, out: out * 2})
    _, past = model.decode(changed, batch, {site: lambda given, out: out * 2}, keep=True)
    model.extend(changed, inputs.ids[:, :1], past)
    half = model.decode(changed, batch, stop=LAYERS - 1)
    model.thin(changed, half)
    assert versions == [t._version for t in tensors]
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies))
    assert all(p.data_ptr() == model.params[n].data_ptr() for n, p in module.named_parameters())
    skeleton = model.decode.__self__.body.skeleton()
    assert all(a is b for a, b in zip(skeleton.parameters(), module.parameters()))
    for path, part in module.named_modules():
        assert vars(part).keys() == plain[path].keys()
        assert all(vars(part)[key] is value for key, value in plain[path].items())


@each_family
def test_nothing_leaks_from_call_to_call(name):
    _, model, inputs, batch = fresh(name)
    text = model.read([Query("where?", "a cat")])
    before = model.embed(model.params, text)
    model.embed(model.params, inputs)
    after = model.embed(model.params, text)
    assert torch.equal(before.hidden, after.hidden)
    assert torch.equal(before.positions, after.positions)
    assert before.extras.keys() == after.extras.keys()
    assert all(torch.equal(value, after.extras[key]) for key, value in before.extras.items())


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "blip2", "gpt2"])
def test_eight_threads_are_serial(name):
    _, model, inputs, _ = fresh(name)
    weight = f"{model.card.site('layers.2.mlp.down')}.weight"
    site = model.card.site("layers.1.mlp.down")

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
    site = model.card.linear("layers.2.mlp.down")
    weight = f"{site}.weight"

    def score(logits):
        picked = logits.log_softmax(-1).gather(-1, inputs.labels.clamp(min=0)[..., None])[..., 0]
        return (picked * (inputs.labels != IGNORE)).sum()

    def by_weight(value):
        return score(model.decode({**model.params, weight: value}, batch))

    def by_probe(probes):
        logits, taps = tap(model.decode, model.params, batch, [site], probes=probes)
        return score(logits), taps[site].input

    delta, given = grad(by_probe, has_aux=True)(zeros(model.card, batch, [site]))
    given = given.reshape(*delta[site].shape[:2], -1)
    product = torch.einsum("bto,bti->oi", delta[site], given)
    want = grad(by_weight)(model.params[weight])
    product = product.T if site in model.card.transposed else product
    torch.testing.assert_close(product, want, rtol=1e-4, atol=1e-5)


@each_family
def test_linear_maps_have_the_sizes_of_the_card(name):
    module, model = made(name)
    for path, (out, width) in model.card.linears.items():
        part = module.get_submodule(path)
        bias = torch.zeros(out)
        x = torch.zeros(1, width)
        own = {"bias": bias} if part.bias is not None else {}
        assert functional_call(part, own, (x,)).shape == (1, out)


@each_family
def test_an_unknown_config_attribute_is_refused_by_name(name):
    module, _ = tiny(name, layers=1)
    module.config.get_text_config().sideways_attention = 3
    family = family_of(module.config.model_type)
    with pytest.raises(ModelUnsupported, match="sideways_attention"):
        core.build(structure.describe(module, family), module, None, None)


@each_family
def test_a_batch_is_cut_where_it_is(name):
    _, model, _, batch = fresh(name)
    half = model.decode(model.params, batch, stop=2)
    with pytest.raises(ShapeMismatch, match="goes on from"):
        model.decode(model.params, half, start=1)
    with pytest.raises(ShapeMismatch, match="goes on from"):
        model.decode(model.params, half, stop=1)


def test_encoder_decoders_are_refused_with_the_reason():
    import transformers as hf

    config = hf.Blip2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        qformer_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                        "num_attention_heads": 2, "encoder_hidden_size": 16, "vocab_size": 32},
        text_config={"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1,
                     "num_heads": 2, "vocab_size": 64},
        num_query_tokens=2,
    )  # fmt: skip
    module = hf.Blip2ForConditionalGeneration(config)
    with pytest.raises(ModelUnsupported, match="encoder-decoder"):
        structure.describe(module, family_of("blip-2"))


def test_inputs_type_is_what_is_read():
    assert isinstance(made("llava").model.read(queries("llava")), Inputs)
