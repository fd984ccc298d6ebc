"""Configs as they are published pass; what an adapter has not heard of is refused by name."""

from __future__ import annotations

import pytest

from errata.adapters.families.table import family_of
from errata.adapters.hf.config_check import check_config
from errata.adapters.zoo.tiny import tiny_model
from errata.functional.errors import UnsupportedModelError

LEGACY = {"is_decoder": False, "max_length": 20, "top_k": 50, "pruned_heads": {}, "prefix": None}
PUBLISHED = {
    # llava-hf/llava-1.5-7b-hf
    "llava": {"": {"ignore_index": -100, "vocab_size": 32064}, "vision_config": {"vocab_size": 9}},
    # llava-hf/llava-onevision-qwen2-7b-ov-hf
    "llava_onevision": {"": {"ignore_index": -100, "use_image_newline_parameter": True}},
    # Qwen/Qwen2-VL-7B-Instruct: a flat config, its text part repeated at the top
    "qwen2_vl": {
        "": {"hidden_size": 3584, "vision_token_id": 151654, "max_window_layers": 28},
        "vision_config": {"in_chans": 3, "spatial_patch_size": 14},
    },
    "qwen2_5_vl": {"": {"rope_theta": 1e6}, "vision_config": {"in_chans": 3}},
    "qwen3_vl": {"text_config": {"rope_theta": 5e6}},
    # Salesforce/blip2-opt-2.7b
    "blip2": {
        "": {"image_text_hidden_size": 256, "use_decoder_only_language_model": True},
        "text_config": {**LEGACY, "activation_dropout": 0.0},
        "qformer_config": {**LEGACY, "position_embedding_type": "absolute"},
        "vision_config": {**LEGACY, "num_channels": 3, "projection_dim": 512},
    },
    "gpt2": {"": {"n_ctx": 1024, "task_specific_params": {}}},
    "llama": {"": {"pretraining_tp": 1}},
    "qwen2": {"": {"use_mrope": False}},
}


def config_with(name, parts):
    config = tiny_model(name, num_layers=1)[0].config
    for part, attributes in parts.items():
        for attribute, value in attributes.items():
            setattr(getattr(config, part) if part else config, attribute, value)
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(name):
    config = config_with(name, PUBLISHED[name])
    check_config(config, family_of(config.model_type))


def test_every_violation_is_named_at_once():
    wrong = {
        "": {"use_image_newline_parameter": False, "tiles_of_tiles": 3},
        "vision_config": {"rotary": "yes"},
    }
    config = config_with("llava_onevision", wrong)
    with pytest.raises(UnsupportedModelError) as caught:
        check_config(config, family_of("llava_onevision"))
    message = str(caught.value)
    for part in (
        "tiles_of_tiles = 3",
        "vision_config.rotary = 'yes'",
        "must be one of (None, True)",
    ):
        assert part in message


def test_values_that_change_a_decoder_are_refused():
    config = config_with("qwen2", {"": {"use_mrope": True, "chunk_size_feed_forward": 4}})
    with pytest.raises(
        UnsupportedModelError, match="chunk_size_feed_forward must be 0, is 4.*use_mrope"
    ):
        check_config(config, family_of("qwen2"))
