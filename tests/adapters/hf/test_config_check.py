"""Published configs pass; unknown keys are proved harmless or refused; known ones are refused."""

from __future__ import annotations

import pytest
import torch

from errata.adapters import from_module
from errata.adapters.families.table import family_of
from errata.adapters.hf import functional_model
from errata.adapters.hf.config_check import check_config
from errata.adapters.zoo.tiny import tiny_model
from errata.functional import Query
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
    assert check_config(config, family_of(config.model_type)) == []


def test_every_violation_is_named_at_once():
    wrong = {
        "": {"use_image_newline_parameter": False, "logit_scale": 0.5},
        "vision_config": {"alibi": True},
    }
    config = config_with("llava_onevision", wrong)
    with pytest.raises(UnsupportedModelError) as caught:
        check_config(config, family_of("llava_onevision"))
    message = str(caught.value)
    for part in (
        "logit_scale = 0.5",
        "vision_config.alibi = True",
        "must be one of (None, True)",
    ):
        assert part in message


HARMLESS = {
    # GGUF conversions, unsloth, older trainers, a published config of SmolVLM2
    "is_llama_config": True,
    "rope_interleaved": False,
    "unk_token_id": 0,
    "unsloth_version": "2024.9",
    "unsloth_fixed": True,
    "max_sequence_length": 2048,
    "cls_token_id": None,
    "use_resampler": False,
    "neftune_noise_alpha": 0.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llama", "blip2", "minigpt4", "qwen3_vl"])
def test_keys_that_nobody_reads_load_with_one_warning(name):
    module, processor = tiny_model(name)
    plain = from_module(module, processor)
    for key, value in HARMLESS.items():
        setattr(module.config.get_text_config(), key, value)
    with pytest.warns(UserWarning, match="equals Hugging Face's on a sample") as warned:
        model = from_module(module, processor)
    assert len(warned) == 1
    assert "unsloth_version = '2024.9'" in str(warned[0].message)
    queries = [Query("who is it?", "bo")]
    with torch.no_grad():
        one, two = (
            m.decode(m.params, m.embed(m.params, m.preprocess(queries))) for m in (plain, model)
        )
    assert torch.equal(one, two)


def test_the_proof_is_left_out_on_request(monkeypatch):
    module, processor = tiny_model("llama")
    module.config.unsloth_version = "1"
    monkeypatch.setattr(functional_model, "require_same_forward", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="attributes are ignored: unsloth_version"):
        from_module(module, processor, verify=False)
    with pytest.raises(ZeroDivisionError):
        from_module(module, processor)


def test_a_forward_that_is_not_hugging_faces_is_refused_with_the_difference(monkeypatch):
    module, processor = tiny_model("llama")
    module.config.tripled = True
    decode = functional_model.FunctionalDecoder.decode
    monkeypatch.setattr(
        functional_model.FunctionalDecoder, "decode", lambda *a, **more: 3 * decode(*a, **more)
    )
    with pytest.raises(UnsupportedModelError, match=r"tripled = True.*logits differ by 2"):
        from_module(module, processor)


def test_values_that_change_a_decoder_are_refused():
    config = config_with("qwen2", {"": {"use_mrope": True, "chunk_size_feed_forward": 4}})
    with pytest.raises(
        UnsupportedModelError, match="chunk_size_feed_forward must be 0, is 4.*use_mrope"
    ):
        check_config(config, family_of("qwen2"))
