"""Qwen3-VL: DeepStack adds vision features between the first layers; a cut there is exact."""

import torch

from errata.functional import Query
from errata.functional.rows import concat
from tests.adapters.models import made, picture, queries, whole


def test_deepstack_rides_in_the_batch_only_at_pictures():
    module, model = made("qwen3_vl")
    inputs = model.read(queries("qwen3_vl"))
    batch = model.embed(model.params, inputs)
    added = sorted(key for key in batch.extras if key.startswith("added."))
    count = len(module.config.vision_config.deepstack_visual_indexes)
    assert len(added) == count > 0
    for key in added:
        assert batch.extras[key][inputs.image].abs().min(-1).values.max() > 0
        assert not batch.extras[key][~inputs.image].any()


def test_a_cut_between_the_layers_that_get_features_is_exact():
    module, model = made("qwen3_vl")
    inputs = model.read(queries("qwen3_vl"))
    want = whole(module, "qwen3_vl", inputs)[inputs.mask]
    batch = model.embed(model.params, inputs)
    for cut in (1, 2):
        half = model.decode(model.params, batch, stop=cut)
        got = model.decode(model.params, half, at="all")
        assert torch.equal(got[inputs.mask], want)
    without = batch._replace(
        extras={key: value for key, value in batch.extras.items() if "added" not in key}
    )
    wrong = model.decode(model.params, without, at="all")
    assert not torch.allclose(wrong[inputs.mask], want)


def test_rows_with_and_without_pictures_join():
    _, model = made("qwen3_vl")
    seen = model.read([Query("what?", "a cat", (picture(1),))])
    text = model.read([Query("where was it?", "the old town")])
    batches = [model.embed(model.params, one) for one in (text, seen)]
    joined = model.decode(model.params, concat(batches))
    for row, batch in enumerate(batches):
        alone = model.decode(model.params, batch)[0]
        torch.testing.assert_close(joined[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_the_projector_is_trained_through_deepstack():
    """Gradients of the merger flow through what is added between layers, too."""
    _, model = made("qwen3_vl")
    inputs = model.read([Query("what?", "a cat", (picture(1),))])
    merger = next(
        p for p in model.params if "deepstack_merger_list.0" in p and p.endswith("weight")
    )

    def score(value):
        params = {**model.params, merger: value}
        return model.decode(params, model.embed(params, inputs)).square().sum()

    gradient = torch.func.grad(score)(model.params[merger])
    assert gradient.abs().max() > 0
