"""What every family refuses, and where a batch may be cut."""

from __future__ import annotations

import pytest

from errata.adapters import from_module
from errata.adapters.families.table import family_of
from errata.adapters.hf import structure
from errata.adapters.zoo.tiny import tiny_model
from errata.functional import Inputs
from errata.functional.errors import ShapeError, UnsupportedModelError
from tests.adapters.test_laws import each_family, fresh
from tests.adapters.zoo_of_families.models import (
    made,
    queries,
)


@each_family
def test_an_unknown_config_attribute_is_warned_of_once_its_forward_is_proved(name):
    module, processor = tiny_model(name, num_layers=1)
    module.config.get_text_config().sideways_attention = 3
    with pytest.warns(UserWarning, match=r"equals Hugging Face's.*sideways_attention = 3"):
        from_module(module, processor)


@each_family
def test_an_attribute_that_changes_the_mathematics_is_refused_by_name(name):
    module, processor = tiny_model(name, num_layers=1)
    module.config.get_text_config().residual_multiplier = 0.3
    with pytest.raises(UnsupportedModelError, match=r"residual_multiplier = 0\.3 changes"):
        from_module(module, processor)


@each_family
def test_a_batch_is_cut_where_it_is(name):
    _, model, _, batch = fresh(name)
    half = model.decode(model.params, batch, stop=2)
    with pytest.raises(ShapeError, match="continues from"):
        model.decode(model.params, half, start=1)
    with pytest.raises(ShapeError, match="continues from"):
        model.decode(model.params, half, stop=1)


def test_encoder_decoders_are_refused_with_the_reason():
    import transformers as hf

    config = hf.Blip2Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        qformer_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
            "vocab_size": 32,
        },
        text_config={
            "model_type": "t5",
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "vocab_size": 64,
        },
        num_query_tokens=2,
    )
    module = hf.Blip2ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        structure.describe_module(module, family_of("blip-2"))


def test_inputs_type_is_what_is_read():
    assert isinstance(made("llava").model.preprocess(queries("llava")), Inputs)
