"""MiniGPT-4: a Hugging Face model like any other, made from the original's files."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor

from errata.adapters import from_module, from_pretrained, tiny_model
from errata.adapters.families.minigpt4_convert import convert_minigpt4, rename_state_dict
from errata.adapters.families.minigpt4_model import MiniGPT4ForConditionalGeneration
from errata.functional import Query
from errata.functional.errors import InvalidInputError

IMAGE = Image.new("RGB", (40, 30), (90, 20, 200))


def original(module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The three `.pth` states that the original would have held for this model.

    Written from LAVIS's and MiniGPT-4's own module trees, with what they carry besides: a fortieth
    block, the vision head, the language side of the Q-Former, the projection to Flan-T5.
    """
    ours = dict(module.named_parameters())
    eva: dict[str, Tensor] = {
        "cls_token": ours["vision_model.embeddings.class_embedding"],
        "pos_embed": ours["vision_model.embeddings.position_embedding"],
        "patch_embed.proj.weight": ours["vision_model.embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": ours["vision_model.embeddings.patch_embedding.bias"],
        "norm.weight": torch.ones(3),
        "head.weight": torch.ones(3, 3),
        "head.bias": torch.ones(3),
    }
    depth = module.config.vision_config.num_hidden_layers
    for block in range(depth + 1):
        stem = f"vision_model.encoder.layers.{min(block, depth - 1)}."
        query, _, value = ours[stem + "self_attn.qkv.bias"].chunk(3)
        there = {"attn.q_bias": query, "attn.v_bias": value}
        for name, mine in (
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
            ("attn.proj", "self_attn.projection"),
        ):
            there |= {f"{name}.{part}": ours[f"{stem}{mine}.{part}"] for part in ("weight", "bias")}
        there["attn.qkv.weight"] = ours[stem + "self_attn.qkv.weight"]
        eva |= {f"blocks.{block}.{name}": tensor.clone() for name, tensor in there.items()}
    blip = {
        "query_tokens": ours["query_tokens"],
        "ln_vision.weight": ours["vision_model.post_layernorm.weight"],
        "ln_vision.bias": ours["vision_model.post_layernorm.bias"],
        "Qformer.bert.embeddings.LayerNorm.weight": ours["qformer.layernorm.weight"],
        "Qformer.bert.embeddings.LayerNorm.bias": ours["qformer.layernorm.bias"],
        "Qformer.bert.embeddings.position_ids": torch.arange(4)[None],
        "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(5, 2),
        "Qformer.cls.predictions.bias": torch.ones(5),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(2, 2),
        "Qformer.bert.encoder.layer.0.output.dense.bias": torch.ones(2),
        "t5_proj.weight": torch.ones(2, 2),
        "t5_proj.bias": torch.ones(2),
    }
    for name, tensor in ours.items():
        if name.startswith("qformer.encoder."):
            name = name.replace(".attention.attention.", ".attention.self.")
            name = name.replace(".crossattention.attention.", ".crossattention.self.")
            blip["Qformer.bert." + name.removeprefix("qformer.")] = tensor
    proj = {
        "llama_proj.weight": ours["language_projection.weight"],
        "llama_proj.bias": ours["language_projection.bias"],
    }
    return eva, blip, proj


def randomised(module):
    """Every tensor its own, biases and norms included, so that a swap shows."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if name.endswith("qkv.bias"):  # keys have no bias in EVA
            width = parameter.shape[0] // 3
            parameter[width : 2 * width] = 0
    return module


@pytest.fixture
def files(tmp_path):
    """The original's four parts on disk, and the model they were taken from."""
    module, processor = tiny_model("minigpt4", num_layers=2)
    with torch.no_grad():
        randomised(module)
    eva, blip, proj = original(module)
    torch.save(eva, tmp_path / "eva_vit_g.pth")
    torch.save({"model": blip}, tmp_path / "blip2_pretrained_flant5xxl.pth")
    torch.save({"model": proj}, tmp_path / "prerained_minigpt4_7b.pth")
    module.language_model.save_pretrained(tmp_path / "vicuna")
    processor.tokenizer.save_pretrained(tmp_path / "vicuna")
    return tmp_path, module, processor


def converted(folder: Path, module, **settings) -> Path:
    return convert_minigpt4(
        folder / "eva_vit_g.pth",
        folder / "blip2_pretrained_flant5xxl.pth",
        folder / "prerained_minigpt4_7b.pth",
        folder / "vicuna",
        folder / "minigpt4",
        vision_config=module.config.vision_config.to_dict(),
        qformer_config=module.config.qformer_config.to_dict(),
        dtype=torch.float32,
        **settings,
    )


def test_the_originals_files_become_the_model(files):
    folder, module, processor = files
    model = from_pretrained(converted(folder, module))
    want = dict(module.named_parameters())
    assert model.params.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(model.params[name], tensor), name
    there = from_module(module, processor)
    rows = [Query("what is it?", "dog", (IMAGE,)), Query("who?", "cat")]
    answers = [
        part.decode(part.params, part.embed(part.params, part.preprocess(rows)))
        for part in (there, model)
    ]
    assert torch.equal(*answers)
    assert not list(folder.glob("*.part"))


def test_released_names_all_find_their_place():
    """The names of the 7B model's own files, with its real depths, against our module tree."""
    config = MiniGPT4ForConditionalGeneration.config_class(
        text_config=hf.LlamaConfig(num_hidden_layers=1), num_query_tokens=32
    )
    with torch.device("meta"):
        module = MiniGPT4ForConditionalGeneration(config)
        eva, blip, proj = original(module)
    named = rename_state_dict({**eva, **blip, **proj}, config.vision_config.num_hidden_layers)
    want = {n: p.shape for n, p in module.named_parameters() if not n.startswith("language_model.")}
    assert config.vision_config.num_hidden_layers == 39
    assert len(eva) == 4 + 3 + 40 * 13
    assert {name: tensor.shape for name, tensor in named.items()} == want


@pytest.mark.parametrize("prefix", ["", "visual_encoder."])
def test_the_tower_may_carry_its_prefix(prefix, files):
    folder, module, _ = files
    eva, _, _ = original(module)
    named = rename_state_dict({prefix + name: tensor for name, tensor in eva.items()}, 2)
    assert "vision_model.encoder.layers.1.self_attn.qkv.bias" in named
    assert all(name.startswith("vision_model.") for name in named)


def test_a_lacking_or_foreign_tensor_is_named_and_nothing_is_written(files):
    folder, module, _ = files
    torch.save(
        {"model": {"llama_proj.weight": torch.ones(3, 3), "lora.A": torch.ones(2)}},
        folder / "prerained_minigpt4_7b.pth",
    )
    with pytest.raises(InvalidInputError) as error:
        converted(folder, module)
    for part in (
        "language_projection.bias is missing",
        "lora.A has no place in the model",
        "language_projection.weight must have shape (32, 32), has (3, 3)",
    ):
        assert part in str(error.value)
    assert not (folder / "minigpt4").exists()
    assert not list(folder.glob("*.part"))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("content", [b"", b"not a torch file", Evil()])
def test_a_file_of_anything_else_is_refused_and_not_run(content, files, monkeypatch):
    folder, module, _ = files
    monkeypatch.chdir(folder)
    path = folder / "eva_vit_g.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"cls_token": content}, path)
    with pytest.raises(
        InvalidInputError, match=r"eva_vit_g\.pth' must be a torch file of plain tensors"
    ):
        converted(folder, module)
    assert not (folder / "ran").exists()


def test_a_missing_part_and_an_existing_output_are_refused(files):
    folder, module, _ = files
    (folder / "minigpt4").mkdir()
    with pytest.raises(InvalidInputError, match="must not exist yet"):
        converted(folder, module)
    (folder / "minigpt4").rmdir()
    (folder / "eva_vit_g.pth").unlink()
    with pytest.raises(InvalidInputError, match="must exist"):
        converted(folder, module)


def test_it_saves_and_loads_as_hugging_face_models_do(tmp_path):
    module, processor = tiny_model("minigpt4")
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "minigpt4"
    again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, MiniGPT4ForConditionalGeneration)
    assert isinstance(again.language_model, hf.LlamaForCausalLM)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters()))


def test_the_answer_depends_on_the_picture_inside_the_prompt():
    model = from_module(*tiny_model("minigpt4"))
    other = Image.new("RGB", (40, 30), (1, 250, 3))
    rows = [Query("what is it?", "dog", (image,)) for image in (IMAGE, other)]
    inputs = model.preprocess(rows)
    with torch.no_grad():
        logits = model.decode(model.params, model.embed(model.params, inputs))
    assert not torch.equal(logits[0], logits[1])
    before = inputs.image_mask[0].nonzero()[0, 0]
    assert before > 5, "the wrapping stands before the picture"
