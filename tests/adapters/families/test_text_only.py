"""GPT-2, Llama, Qwen2: no images, tied heads, weights stored the other way round."""

import pytest
import torch

from errata.adapters.families.table import family_of
from errata.adapters.hf import functional_model, structure
from errata.adapters.zoo.tiny import tiny_model
from errata.functional.errors import UnknownSiteError, UnsupportedModelError
from tests.adapters.zoo_of_families.models import made, queries


def test_gpt2_stores_its_linears_transposed():
    module, model = made("gpt2")
    card = model.card
    assert card.linear_shapes[card.resolve_site("layers.0.mlp.up")] == (128, 32)
    assert card.resolve_linear("layers.0.mlp.up") in card.transposed
    assert model.params[f"{card.resolve_site('layers.0.mlp.up')}.weight"].shape == (32, 128)
    assert card.resolve_linear("layers.0.attn.qkv") == "transformer.h.0.attn.c_attn"
    with pytest.raises(UnknownSiteError):
        card.resolve_linear("layers.0.attn.q")


def test_a_tied_head_follows_the_embedding():
    _, model = made("gpt2")
    name = model.card.tied["lm_head.weight"]
    assert name == "transformer.wte.weight"
    assert "lm_head.weight" not in model.params
    inputs = model.preprocess(queries("gpt2"))
    batch = model.embed(model.params, inputs)
    doubled = {**model.params, name: model.params[name] * 2}
    want = model.decode(model.params, batch) * 2
    torch.testing.assert_close(model.decode(doubled, batch), want)
    assert not torch.equal(model.embed(doubled, inputs).hidden_states, batch.hidden_states)


def test_a_module_in_training_mode_is_read_in_evaluation_mode():
    module, _ = tiny_model("gpt2", num_layers=2)
    module.train()
    family = family_of("gpt2")
    model = functional_model.functionalize(
        structure.describe_module(module, family), module, None, None
    )
    assert module.training
    inputs = made("gpt2").model.preprocess(queries("gpt2"))
    batch = model.embed(model.params, inputs)
    first, second = (model.decode(model.params, batch) for _ in range(2))
    assert torch.equal(first, second)  # no dropout


def test_parameters_that_ask_for_gradients_are_taken_without():
    module, _ = tiny_model("llama", num_layers=2)
    module.requires_grad_(True)
    family = family_of("llama")
    model = functional_model.functionalize(
        structure.describe_module(module, family), module, None, None
    )
    assert not any(value.requires_grad for value in model.params.values())
    inputs = made("llama").model.preprocess(queries("llama"))
    assert not model.decode(model.params, model.embed(model.params, inputs)).requires_grad


def test_cross_attention_is_refused():
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        add_cross_attention=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    module = hf.GPT2LMHeadModel(config)
    with pytest.raises(UnsupportedModelError, match="add_cross_attention must be False"):
        functional_model.functionalize(
            structure.describe_module(module, family_of("gpt2")), module, None, None
        )


def test_a_model_without_a_head_is_refused():
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(UnsupportedModelError, match="head"):
        structure.describe_module(hf.LlamaModel(config), family_of("llama"))
