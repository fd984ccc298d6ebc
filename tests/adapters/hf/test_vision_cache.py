"""Images are looked at once per content, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from errata.adapters import cache_vision_features
from errata.functional import Query
from tests.adapters.zoo_of_families.models import VIDEO, made, make_image, queries

SEEING = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "blip2", "minigpt4")


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SEEING)
def test_rows_that_share_a_picture_share_its_features(name):
    model = made(name).model
    once = cache_vision_features(model)
    shared = [Query(words, "a cat", (make_image(1),)) for words in ("what?", "who is in there?")]
    asked = [*shared, Query("where?", "the river", (make_image(2),)), Query("why?", "a dog")]
    inputs = model.preprocess(asked)
    want = model.embed(model.params, inputs)
    got = once.embed(once.params, inputs)
    close(got.hidden_states, want.hidden_states)
    close(once.decode(once.params, got), model.decode(model.params, want))
    assert got.layer_inputs.keys() == want.layer_inputs.keys()
    again = once.embed(once.params, once.preprocess([asked[2]]))
    length = again.hidden_states.shape[1]
    assert torch.equal(
        again.hidden_states[0], got.hidden_states[2, :length]
    )  # independent of the batch


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_each_content_is_looked_at_once(name):
    model = made(name).model
    once = cache_vision_features(model)
    body = model.decode.__self__.runner
    owner = body.replica().get_submodule(body.family.vision_features_path)
    looks = []
    tower = body.replica().get_submodule(model.card.vision_tower)
    hook = tower.register_forward_hook(lambda *_: looks.append(1))
    try:
        rows = [Query(words, "a cat", (make_image(seed),)) for words in "ab" for seed in (1, 2)]
        for _ in range(3):
            once.embed(once.params, once.preprocess(rows))
    finally:
        hook.remove()
    assert len(looks) == 2
    assert "get_image_features" not in vars(owner)


@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_an_edited_tower_is_not_served(name):
    model = made(name).model
    once = cache_vision_features(model)
    inputs = once.preprocess([Query("what?", "a cat", (make_image(1),))])
    base = once.embed(once.params, inputs).hidden_states
    weight = next(
        n for n in model.params if n.startswith(model.card.vision_tower) and n.endswith("weight")
    )
    changed = {**model.params, weight: model.params[weight] * 1.5}
    got = once.embed(changed, inputs).hidden_states
    assert torch.equal(got, model.embed(changed, inputs).hidden_states)
    assert not torch.allclose(got, base)
    loud = {model.card.vision_tower: lambda given, out: out * 2}
    assert torch.equal(
        once.embed(once.params, inputs, loud).hidden_states,
        model.embed(model.params, inputs, loud).hidden_states,
    )
    assert torch.equal(once.embed(once.params, inputs).hidden_states, base)


@pytest.mark.parametrize("name", VIDEO)
def test_several_pictures_and_videos_are_as_before(name):
    model = made(name).model
    once = cache_vision_features(model)
    film = Query("what happens?", "a dog", tuple(make_image(n) for n in range(4)), video=True)
    for asked in (queries(name), [film, Query("what?", "a cat", (make_image(9),))]):
        inputs = model.preprocess(asked)
        got, want = once.embed(once.params, inputs), model.embed(model.params, inputs)
        close(got.hidden_states, want.hidden_states)


def test_a_decoder_of_words_comes_back_as_it_is():
    model = made("gpt2").model
    assert cache_vision_features(model) is model
