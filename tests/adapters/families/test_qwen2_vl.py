"""Qwen2-VL and Qwen2.5-VL: positions in three axes, handed in, with no state between calls."""

import pytest
import torch

from errata.functional import Query
from tests.adapters.zoo_of_families.models import made, make_image, queries, whole

both = pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])


@both
def test_positions_are_those_of_the_module(name):
    module, model = made(name)
    inputs = model.preprocess(queries(name))
    batch = model.embed(model.params, inputs)
    kinds = inputs.image_mask.int()
    want, _ = module.model.get_rope_index(
        inputs.input_ids,
        mm_token_type_ids=kinds,
        image_grid_thw=inputs.vision_inputs["image_grid_thw"],
        attention_mask=inputs.attention_mask.long(),
    )
    assert batch.position_ids.shape[1] == 3
    for row, mask in enumerate(inputs.attention_mask):
        assert torch.equal(batch.position_ids[row][:, mask], want[:, row][:, mask])
    spread = batch.position_ids.amax(1) - batch.position_ids.amin(1)
    assert bool((spread[inputs.image_mask] > 0).any())  # height and width differ inside an image
    assert not spread[~inputs.image_mask & inputs.attention_mask].any()


@both
def test_the_module_keeps_no_offset(name):
    module, model = made(name)
    module.model.rope_deltas = None
    model.embed(model.params, model.preprocess(queries(name)))
    assert module.model.rope_deltas is None


@both
def test_the_token_behind_pictures_follows_the_largest_position(name):
    _, model = made(name)
    inputs = model.preprocess([Query("what?", "", (make_image(1, 80, 40),))])
    batch = model.embed(model.params, inputs)
    _, past = model.decode(model.params, batch, return_cache=True)
    last = batch.position_ids.amax()
    assert torch.equal(past.next_position, (last + 1).expand(1, 3))
    assert int(last) + 1 < inputs.input_ids.shape[1]  # an image takes fewer positions than tokens


@both
def test_pictures_of_different_sizes_share_a_batch(name):
    module, model = made(name)
    rows = [
        Query("what?", "a cat", (make_image(1, 32, 32),)),
        Query("which of these?", "the chair", (make_image(2, 96, 40), make_image(3, 40, 64))),
    ]
    inputs = model.preprocess(rows)
    got = model.decode(model.params, model.embed(model.params, inputs), logit_positions="all")
    assert torch.equal(
        got[inputs.attention_mask], whole(module, name, inputs)[inputs.attention_mask]
    )


@both
def test_the_checkpoint_names_are_those_a_checkpoint_has(name, tmp_path):
    from safetensors import safe_open

    module, model = made(name)
    module.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    assert {model.card.checkpoint_name(held) for held in model.params} == names
