"""Pictures are looked at once per content, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from errata.adapters import seeing_once
from errata.functional import Query
from tests.adapters.models import VIDEO, made, picture, queries

SEEING = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "blip2", "minigpt4")


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SEEING)
def test_rows_that_share_a_picture_share_its_features(name):
    model = made(name).model
    once = seeing_once(model)
    shared = [Query(words, "a cat", (picture(1),)) for words in ("what?", "who is in there?")]
    asked = [*shared, Query("where?", "the river", (picture(2),)), Query("why?", "a dog")]
    inputs = model.read(asked)
    want = model.embed(model.params, inputs)
    got = once.embed(once.params, inputs)
    close(got.hidden, want.hidden)
    close(once.decode(once.params, got), model.decode(model.params, want))
    assert got.extras.keys() == want.extras.keys()
    again = once.embed(once.params, once.read([asked[2]]))
    length = again.hidden.shape[1]
    assert torch.equal(again.hidden[0], got.hidden[2, :length])  # whoever shared the batch


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_each_content_is_looked_at_once(name):
    model = made(name).model
    once = seeing_once(model)
    body = model.decode.__self__.body
    owner = body.skeleton().get_submodule(body.family.features)
    looks = []
    tower = body.skeleton().get_submodule(model.card.vision)
    hook = tower.register_forward_hook(lambda *_: looks.append(1))
    try:
        rows = [Query(words, "a cat", (picture(seed),)) for words in "ab" for seed in (1, 2)]
        for _ in range(3):
            once.embed(once.params, once.read(rows))
    finally:
        hook.remove()
    assert len(looks) == 2
    assert "get_image_features" not in vars(owner)


@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_an_edited_tower_is_not_served(name):
    model = made(name).model
    once = seeing_once(model)
    inputs = once.read([Query("what?", "a cat", (picture(1),))])
    base = once.embed(once.params, inputs).hidden
    weight = next(
        n for n in model.params if n.startswith(model.card.vision) and n.endswith("weight")
    )
    changed = {**model.params, weight: model.params[weight] * 1.5}
    got = once.embed(changed, inputs).hidden
    assert torch.equal(got, model.embed(changed, inputs).hidden)
    assert not torch.allclose(got, base)
    loud = {model.card.vision: lambda given, out: out * 2}
    assert torch.equal(
        once.embed(once.params, inputs, loud).hidden, model.embed(model.params, inputs, loud).hidden
    )
    assert torch.equal(once.embed(once.params, inputs).hidden, base)


@pytest.mark.parametrize("name", VIDEO)
def test_several_pictures_and_videos_are_as_before(name):
    model = made(name).model
    once = seeing_once(model)
    film = Query("what happens?", "a dog", tuple(picture(n) for n in range(4)), video=True)
    for asked in (queries(name), [film, Query("what?", "a cat", (picture(9),))]):
        inputs = model.read(asked)
        got, want = once.embed(once.params, inputs), model.embed(model.params, inputs)
        close(got.hidden, want.hidden)


def test_a_decoder_of_words_comes_back_as_it_is():
    model = made("gpt2").model
    assert seeing_once(model) is model
