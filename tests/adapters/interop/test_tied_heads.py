"""A LoRA on a head that shares its weight with the embedding: as PEFT has it, the head alone."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from errata.adapters import from_module, from_pretrained, tiny_model
from errata.adapters.interop.attachment import attach
from errata.adapters.interop.peft_export import export_peft
from errata.adapters.interop.peft_import import import_peft
from errata.editors import configure, make_editor
from errata.functional import Query, bind, generate
from errata.functional.deltas.fusing import fuse
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import DeltaFileError, UnsupportedKindError

NAMES = ["llava", "qwen2_vl", "llama", "qwen2"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:Model has `tie_word_embeddings",
    "ignore:Setting `save_embedding_layers`",
)
ASKED = [Query("who is it?", "a red cat"), Query("where is the chair?", "left")]


def tied(name):
    """A tiny module whose head is its embedding, and its processor."""
    module, processor = tiny_model(name)
    for config in (module.config, module.config.get_text_config()):
        config.tie_word_embeddings = True
    module.lm_head.weight = module.get_input_embeddings().weight
    return module, processor


def logits(model):
    inputs = model.preprocess(ASKED)
    return model.decode(model.params, model.embed(model.params, inputs))


def adapter(module, folder):
    """A PEFT LoRA on the head, saved as PEFT saves it."""
    torch.manual_seed(0)
    made = peft.get_peft_model(
        copy.deepcopy(module), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"])
    )
    for name, parameter in made.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(folder)
    return made


def peft_logits(made, model):
    inputs = model.preprocess(ASKED)
    body = made.base_model.model
    out = body(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask.long(), use_cache=False
    ).logits
    return out.gather(1, inputs.logit_positions[..., None].expand(-1, -1, out.shape[-1]))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_on_a_tied_head_computes_what_peft_computes(name, tmp_path):
    module, processor = tied(name)
    model = from_module(module, processor)
    assert model.card.tied
    made = adapter(module, tmp_path / "adapter")
    delta = import_peft(tmp_path / "adapter", model)
    with torch.no_grad():
        want = peft_logits(made, model)
        got = logits(bind(model, delta))
        assert (want - logits(model)).abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        with attach(module, delta):
            torch.testing.assert_close(
                peft_logits(_Plain(module), model), want, rtol=1e-5, atol=1e-5
            )


class _Plain:
    def __init__(self, module):
        self.base_model = self
        self.model = module


def test_tied_and_untied_heads_give_the_same_bits(tmp_path):
    module, processor = tied("llava")
    free = copy.deepcopy(module)
    free.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    for config in (free.config, free.config.get_text_config()):
        config.tie_word_embeddings = False
    adapter(module, tmp_path / "adapter")
    shared, own = from_module(module, processor), from_module(free, processor)
    one = bind(shared, import_peft(tmp_path / "adapter", shared))
    two = bind(own, import_peft(tmp_path / "adapter", own))
    assert torch.equal(logits(one), logits(two))


def test_the_lora_editor_edits_a_tied_head_alone():
    model = from_module(*tied("llava"))
    editor = make_editor(configure("lora", target_modules=["head"], rank=16, num_steps=80, lr=0.05))
    state = editor.init(model, torch.Generator().manual_seed(0))
    delta, _ = editor.edit(model, state, ASKED[:1])
    assert [entry.name for entry in delta.header.entries] == ["lm_head.weight"]
    edited = bind(model, delta)
    inputs = model.preprocess(ASKED)
    same = edited.embed(edited.params, inputs).hidden_states
    assert torch.equal(same, model.embed(model.params, inputs).hidden_states)
    assert generate(edited, ASKED[:1], max_new_tokens=8)[0].strip().startswith("a red cat")
    for one in unstack(editor.edit_each(model, state, ASKED)):
        assert not torch.equal(logits(bind(model, one)), logits(model))


def test_fusing_says_that_it_must_untie_and_does_so_on_request(tmp_path):
    module, processor = tied("llava")
    module.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    assert not any("lm_head" in key for key in load_file(tmp_path / "base/model.safetensors"))
    model = from_pretrained(tmp_path / "base")
    adapter(module, tmp_path / "adapter")
    delta = import_peft(tmp_path / "adapter", model)
    with pytest.raises(UnsupportedKindError, match="shares its weight with .* Pass untie=True"):
        fuse(delta, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fuse(delta, tmp_path / "base", tmp_path / "out", untie=True)
    fused = from_pretrained(tmp_path / "out")
    assert not fused.card.tied
    with torch.no_grad():
        want = logits(bind(model, delta))
        torch.testing.assert_close(logits(fused), want, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_saved_base_weight_is_accepted_only_if_it_is_the_bases(tmp_path):
    module, processor = tied("qwen2_vl")
    model = from_module(module, processor)
    adapter(module, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(path) | {key: module.lm_head.weight.detach().clone()}
    save_file(tensors, path)
    delta = import_peft(tmp_path / "adapter", model)
    assert [entry.name for entry in delta.header.entries] == ["lm_head.weight"]
    with pytest.raises(DeltaFileError, match="pass the model"):
        import_peft(tmp_path / "adapter")
    save_file(tensors | {key: tensors[key] + 0.01}, path)
    with pytest.raises(DeltaFileError, match="holds other values"):
        import_peft(tmp_path / "adapter", model)


def test_an_export_of_a_tied_head_goes_there_and_back(tmp_path):
    module, processor = tied("llava")
    model = from_module(module, processor)
    adapter(module, tmp_path / "adapter")
    delta = import_peft(tmp_path / "adapter", model)
    export_peft(delta, tmp_path / "again")
    back = import_peft(tmp_path / "again", model)
    assert torch.equal(logits(bind(model, back)), logits(bind(model, delta)))
