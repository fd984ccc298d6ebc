"""Qwen3-VL: DeepStack adds vision features between the first layers; a cut there is exact."""

import torch

from errata.functional import Query
from errata.functional.forward.batches import concat_batches
from tests.adapters.zoo_of_families.models import made, make_image, queries, whole


def test_deepstack_rides_in_the_batch_only_at_pictures():
    module, model = made("qwen3_vl")
    inputs = model.preprocess(queries("qwen3_vl"))
    batch = model.embed(model.params, inputs)
    added = sorted(key for key in batch.layer_inputs if key.startswith("added."))
    count = len(module.config.vision_config.deepstack_visual_indexes)
    assert len(added) == count > 0
    for key in added:
        assert batch.layer_inputs[key][inputs.image_mask].abs().min(-1).values.max() > 0
        assert not batch.layer_inputs[key][~inputs.image_mask].any()


def test_a_cut_between_the_layers_that_get_features_is_exact():
    module, model = made("qwen3_vl")
    inputs = model.preprocess(queries("qwen3_vl"))
    want = whole(module, "qwen3_vl", inputs)[inputs.attention_mask]
    batch = model.embed(model.params, inputs)
    for cut in (1, 2):
        half = model.decode(model.params, batch, stop=cut)
        got = model.decode(model.params, half, logit_positions="all")
        assert torch.equal(got[inputs.attention_mask], want)
    without = batch._replace(
        layer_inputs={key: value for key, value in batch.layer_inputs.items() if "added" not in key}
    )
    wrong = model.decode(model.params, without, logit_positions="all")
    assert not torch.allclose(wrong[inputs.attention_mask], want)


def test_rows_with_and_without_pictures_join():
    _, model = made("qwen3_vl")
    seen = model.preprocess([Query("what?", "a cat", (make_image(1),))])
    text = model.preprocess([Query("where was it?", "the old town")])
    batches = [model.embed(model.params, one) for one in (text, seen)]
    joined = model.decode(model.params, concat_batches(batches))
    for row, batch in enumerate(batches):
        alone = model.decode(model.params, batch)[0]
        torch.testing.assert_close(joined[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_the_projector_is_trained_through_deepstack():
    """Gradients of the merger flow through what is added between layers, too."""
    _, model = made("qwen3_vl")
    inputs = model.preprocess([Query("what?", "a cat", (make_image(1),))])
    merger = next(
        p for p in model.params if "deepstack_merger_list.0" in p and p.endswith("weight")
    )

    def score(value):
        params = {**model.params, merger: value}
        return model.decode(params, model.embed(params, inputs)).square().sum()

    gradient = torch.func.grad(score)(model.params[merger])
    assert gradient.abs().max() > 0
