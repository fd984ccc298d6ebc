"""Loading: folders as Hugging Face writes them, one copy of the weights, and what is refused."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from errata import adapters
from errata.adapters import from_module, from_pretrained, tiny_model
from errata.adapters.families.table import FAMILIES, tiny_families
from errata.adapters.loading.load import load_parts
from errata.functional import Query
from errata.functional.errors import (
    ErrataError,
    InvalidInputError,
    InvalidSettingsError,
    UnsupportedModelError,
)

STOCK = {  # what a hub folder calls its processor
    "llava_onevision": "LlavaOnevisionProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def make_image(red: int = 90, width: int = 50, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (red, 20, 200))


def saved(name: str, folder: Path) -> Path:
    module, processor = tiny_model(name, num_layers=2)
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def asked(model) -> list[Query]:
    rows = [Query("what is it?", "two dogs")]
    if model.card.takes_images:
        rows.append(Query("and here?", "red cat", (make_image(),)))
    if model.card.takes_videos:
        frames = (make_image(1), make_image(2), make_image(3))
        rows.append(Query("what moves?", "the chair", frames, video=True))
    return rows


def logits(model, inputs):
    with torch.no_grad():
        return model.decode(model.params, model.embed(model.params, inputs))


@pytest.mark.parametrize("name", tiny_families())
def test_what_is_saved_is_loaded(name, tmp_path):
    """From a folder as the hub has it, torchvision or not: the same reading, the same logits."""
    folder = saved(name, tmp_path / "model")
    if name in STOCK:
        path = folder / "processor_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"processor_class": STOCK[name]}))
    want, got = from_module(*tiny_model(name, num_layers=2)), from_pretrained(folder)
    assert got.card.id == "model"
    assert (got.card.family, got.card.config_hash) == (want.card.family, want.card.config_hash)
    rows = asked(want)
    there, here = want.preprocess(rows), got.preprocess(rows)
    assert torch.equal(there.input_ids, here.input_ids)
    assert there.vision_inputs.keys() == here.vision_inputs.keys()
    assert all(
        torch.equal(there.vision_inputs[part], here.vision_inputs[part])
        for part in there.vision_inputs
    )
    assert torch.equal(logits(want, there), logits(got, here))
    assert not any(tensor.requires_grad for tensor in got.params.values())


def test_old_hub_folders_keep_their_settings_in_other_files(tmp_path):
    """Qwen2-VL as first published: preprocessor_config.json, chat_template.json, min_pixels."""
    folder = saved("qwen2_vl", tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    size = settings.pop("size")
    settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    want, got = from_module(*tiny_model("qwen2_vl", num_layers=2)), from_pretrained(folder)
    rows = asked(want)
    assert torch.equal(want.preprocess(rows).input_ids, got.preprocess(rows).input_ids)


def test_the_checkpoints_own_video_settings_are_used(tmp_path):
    folder = saved("qwen2_vl", tmp_path / "model")
    video = {
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "resample": 3,
        "size": {"shortest_edge": 256, "longest_edge": 1024},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    query = Query("what?", "x", (make_image(width=64, height=64),) * 2, video=True)
    small = from_pretrained(folder).preprocess([query]).vision_inputs["video_grid_thw"]
    large = (
        from_module(*tiny_model("qwen2_vl", num_layers=2))
        .preprocess([query])
        .vision_inputs["video_grid_thw"]
    )
    assert small.tolist() == [[1, 4, 4]]
    assert large.tolist() == [[1, 8, 8]]


@pytest.mark.parametrize(
    ("asked_for", "dtype"),
    [(None, torch.float32), ("bf16", torch.bfloat16), ("float64", torch.float64)],
)
def test_dtype_is_the_checkpoints_or_the_one_asked_for(asked_for, dtype, tmp_path):
    folder = saved("llama", tmp_path / "model")
    model = from_pretrained(folder, dtype=asked_for)
    assert {tensor.dtype for tensor in model.params.values()} == {dtype}


def test_a_sharded_checkpoint_is_one(tmp_path):
    module, tokenizer = tiny_model("llama")
    module.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    model = from_pretrained(tmp_path / "model")
    want = dict(module.named_parameters())
    assert all(torch.equal(model.params[name], want[name]) for name in want)
    next((tmp_path / "model").glob("model-00002*.safetensors")).unlink()
    with pytest.raises(InvalidInputError, match="00002.* is named in the index and not there"):
        from_pretrained(tmp_path / "model")


def test_weights_are_in_memory_once(tmp_path):
    """A checkpoint of 75 MB adds little private memory: the mapped file is the copy."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    with torch.device("meta"):
        names = LlamaForCausalLM(config).state_dict()
    config.save_pretrained(tmp_path / "model")
    tiny_model("llama")[1].save_pretrained(tmp_path / "model")
    weights = {name: torch.full(tensor.shape, 0.01) for name, tensor in names.items()}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    script = f"""
        from errata import adapters

        def private():
            with open("/proc/self/status") as lines:
                return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) / 1024

        adapters.from_module(*adapters.tiny_model("llama"))  # everything is imported and warm
        before = private()
        model = adapters.from_pretrained({str(tmp_path / "model")!r})
        print(sum(t.nbytes for t in model.params.values()) / 2**20, private() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    size, grown = map(float, done.stdout.split())
    assert size > 60
    assert grown < 0.25 * size, f"{grown:.0f} MB of private memory for {size:.0f} MB of weights"


# ---- what is refused


def refused(path, **settings) -> str:
    with pytest.raises(ErrataError) as error:
        from_pretrained(path, **settings)
    return str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    assert "must be a folder or a hub id, and is not there" in refused(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    assert "and is a file" in refused(tmp_path / "file")


def test_a_hub_id_out_of_reach():
    assert "must be a folder, or a hub id in the cache or within reach" in refused("no/such-model")


def test_a_folder_without_config(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "must hold config.json, as save_pretrained writes it; it has notes.txt" in refused(
        tmp_path
    )


@pytest.mark.parametrize(
    "config", ['{"model_type": "nonesuch"}', "{}", '{"model_type": "clip"}', '{"model_type": "t5"}']
)
def test_a_config_that_is_no_language_model(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises((UnsupportedModelError, InvalidInputError)):
        from_pretrained(tmp_path)


def test_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert refused(tmp_path)


def test_weights_in_another_format(tmp_path):
    folder = saved("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.h5")
    said = refused(folder)
    assert "must hold *.safetensors (or *.bin, *.pt), and has model.h5: save the model" in said


def test_a_truncated_file_is_named(tmp_path):
    folder = saved("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is truncated or no safetensors file" in refused(folder)


def test_nan_weights_are_named(tmp_path):
    folder = saved("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 3] = float("nan")
    weights["model.norm.weight"] = weights["model.norm.weight"].clone() / 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused(folder)
    assert f"{name} (1 of " in said
    assert "model.norm.weight" in said
    assert load_parts(folder, check=False)[0].config.num_hidden_layers == 2


def test_missing_and_misshapen_weights_are_named(tmp_path):
    folder = saved("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.self_attn.q_proj.weight is missing" in refused(folder)
    saved("llama", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight must have shape (32,), has (7,)" in refused(folder)


@pytest.mark.parametrize("gone", ["tokenizer.json", "processor_config.json"])
def test_a_missing_processor_file(gone, tmp_path):
    folder = saved("llava", tmp_path / "model")
    (folder / gone).unlink()
    assert "must load (tokenizer and image processor files)" in refused(folder)


@pytest.mark.parametrize("dtype", ["int8", "float99", torch.int64, 3])
def test_a_dtype_that_is_none(dtype, tmp_path):
    folder = saved("llama", tmp_path / "model")
    with pytest.raises(InvalidSettingsError, match="dtype must be float32"):
        from_pretrained(folder, dtype=dtype)


def test_nothing_a_checkpoint_brings_is_run(tmp_path):
    """A config that points to code of its own is refused, not imported."""
    folder = saved("llama", tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "evil.Config"},
    }
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    refused(folder)
    assert not (tmp_path / "ran").exists()


def test_a_refused_load_leaves_the_folder_as_it_was(tmp_path):
    folder = saved("llama", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    from_pretrained(folder)
    refused(folder, dtype="int8")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- the package


def test_importing_adapters_loads_neither_torch_nor_transformers():
    script = (
        "import sys; from errata import adapters; adapters.TEMPLATES;"
        "print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_functions_stay_functions_after_their_modules_are_imported():
    script = (
        "import errata.adapters.loading.load, errata.adapters.zoo.tiny, errata.adapters.zoo.micro\n"
        "from errata import adapters\n"
        "assert all(callable(f) for f in (adapters.from_pretrained, adapters.tiny_model, "
        "adapters.load_micro))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_names_of_families_are_those_of_the_table():
    assert set(adapters.list_families()) == set(FAMILIES)


def test_revision_and_id_are_recorded(tmp_path):
    module, processor = tiny_model("llama")
    model = from_module(module, processor, id="org/model", revision="abc123")
    assert (model.card.id, model.card.revision) == ("org/model", "abc123")
    folder = saved("llama", tmp_path / "mine")
    assert load_parts(folder)[2] == ""


def test_a_hub_id_in_the_cache_is_loaded_with_its_commit(tmp_path):
    """The cache's layout, as the hub client keeps it; no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--org--small"
    saved("llava", home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    script = (
        "from errata import adapters; card = adapters.from_pretrained('org/small').card;"
        "print(card.id, card.revision)"
    )
    there = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=there
    )
    assert done.stdout.split() == ["org/small", commit]


def test_an_unknown_tiny_or_micro_is_refused_with_the_names():
    with pytest.raises(UnsupportedModelError, match="one of blip2, gpt2, .*; got 'lava'"):
        tiny_model("lava")
    with pytest.raises(ErrataError, match="micro model must be one of"):
        adapters.load_micro("lava")
    with pytest.raises(
        UnsupportedModelError, match="multiple of 32, got num_layers=0, hidden_size=40"
    ):
        tiny_model("llava", num_layers=0, hidden_size=40)


def test_tiny_models_follow_from_their_seed():
    first, again, other = (tiny_model("llava", seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
