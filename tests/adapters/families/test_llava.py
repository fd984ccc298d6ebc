"""LLaVA-1.5 and LLaVA-OneVision: features replace placeholders; the card knows the places."""

import copy

import pytest
import torch

from errata.adapters.families.table import family_of
from errata.adapters.hf import functional_model, structure
from errata.functional import Query
from errata.functional.errors import UnknownSiteError
from tests.adapters.zoo_of_families.models import made, make_image, queries, whole

both = pytest.mark.parametrize("name", ["llava", "llava_onevision"])


@both
def test_pictures_stand_where_the_placeholders_are(name):
    _, model = made(name)
    asked = [Query("what?", "a cat", (make_image(1),)), Query("what?", "a cat", (make_image(2),))]
    inputs = model.preprocess(asked)
    batch = model.embed(model.params, inputs)
    apart = (batch.hidden_states[0] - batch.hidden_states[1]).abs().amax(-1) > 0
    assert not apart[~inputs.image_mask[0]].any()
    assert apart[inputs.image_mask[0]].sum() >= 4  # all but the learned ends of a tile's lines


@both
def test_neutral_sites_are_the_family_paths(name):
    card = made(name).model.card
    assert card.resolve_site("layers.-1.mlp.down").endswith("layers.3.mlp.down_proj")
    assert card.resolve_site("vision") == "model.vision_tower"
    assert card.resolve_site("projector") == "model.multi_modal_projector"
    assert (
        card.resolve_linear("layers.0.attn.q") == "model.language_model.layers.0.self_attn.q_proj"
    )
    assert len(card.match_linears(["layers.*.attn.v"])) == 4
    assert card.norm == "model.language_model.norm"
    with pytest.raises(UnknownSiteError):
        card.resolve_linear("layers.0")


@both
def test_rewrites_and_gradients_reach_projector_and_tower(name):
    _, model = made(name)
    inputs = model.preprocess([Query("what?", "a cat", (make_image(1),))])
    site = model.card.projector
    plain = model.embed(model.params, inputs)
    loud = model.embed(model.params, inputs, {site: lambda given, out: out * 2})
    apart = (plain.hidden_states - loud.hidden_states).abs().amax(-1) > 0
    assert bool(apart[inputs.image_mask].any())
    assert not apart[~inputs.image_mask].any()
    weights = [p for p in model.params if p.startswith(site) and p.endswith("weight")]
    weights.append(f"{model.card.match_linears(['*vision_tower*'])[0]}.weight")

    def score(values):
        params = {**model.params, **values}
        return model.decode(params, model.embed(params, inputs)).square().sum()

    gradients = torch.func.grad(score)({name: model.params[name] for name in weights})
    assert all(value.abs().max() > 0 for value in gradients.values())


def test_pictures_of_any_shape_are_tiled():
    """LLaVA-OneVision: rows with one image of another aspect, and with several."""
    module, model = made("llava_onevision")
    asked = [
        Query("what?", "a cat", (make_image(1, 90, 30),)),
        Query("what?", "a cat", (make_image(2, 30, 64),)),
        Query("which?", "the chair", (make_image(3, 50, 30), make_image(4, 30, 30))),
    ]
    inputs = model.preprocess(asked)
    got = model.decode(model.params, model.embed(model.params, inputs), logit_positions="all")
    assert torch.equal(
        got[inputs.attention_mask], whole(module, "llava_onevision", inputs)[inputs.attention_mask]
    )


@both
def test_half_precision_is_kept(name):
    module, model = made(name)
    half = copy.deepcopy(module).to(torch.bfloat16)
    family = family_of(half.config.model_type)
    low = functional_model.functionalize(
        structure.describe_module(half, family), half, model.preprocess, model.detokenize
    )
    inputs = model.preprocess(queries(name))  # in fp32
    batch = low.embed(low.params, inputs)
    got = low.decode(low.params, batch, logit_positions="all")
    assert batch.hidden_states.dtype == got.dtype == torch.bfloat16
    pixels = {
        key: value.to(torch.bfloat16) if value.is_floating_point() else value
        for key, value in inputs.vision_inputs.items()
        if isinstance(value, torch.Tensor)
    }
    inputs = inputs._replace(vision_inputs={**inputs.vision_inputs, **pixels})
    assert torch.equal(got[inputs.attention_mask], whole(half, name, inputs)[inputs.attention_mask])
