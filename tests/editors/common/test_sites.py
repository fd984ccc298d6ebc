from __future__ import annotations

import pytest
import torch
from PIL import Image

from errata import adapters
from errata.editors import METHODS
from errata.editors.common.sites import resolve_linears, resolve_parameters
from errata.editors.finetune import FinetuneConfig, finetune_editor
from errata.editors.lora import LoraConfig, lora_editor
from errata.functional import Query
from errata.functional.errors import UnknownSiteError

VISION_FAMILIES = (
    "llava",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "blip2",
    "minigpt4",
)


def tiny(name: str, layers: int = 3):
    return adapters.from_module(*adapters.tiny_model(name, num_layers=layers))


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_the_last_vision_block_changes_the_answer(name):
    model = tiny(name)
    query = Query("what is it?", "bo", (Image.effect_noise((40, 40), 60).convert("RGB"),))
    for editor in (
        finetune_editor(FinetuneConfig(sites=("vision.layers.-1.mlp",), num_steps=2)),
        lora_editor(LoraConfig(target_modules=("vision.layers.-1.mlp",), rank=2, num_steps=2)),
    ):
        state = editor.init(model, torch.Generator().manual_seed(0))
        delta, _ = editor.edit(model, state, [query])
        moved = [name for name, tensor in delta.tensors.items() if not name.endswith(".A")]
        assert moved
        assert all(float(delta.tensors[name].abs().max()) > 0 for name in moved)


def test_llava_reads_its_features_below_the_last_vision_block():
    model = tiny("llava")
    blocks = len({p for p in model.card.linear_shapes if p.endswith("mlp.fc1") and "vision" in p})
    assert model.card.num_vision_layers == blocks - 1
    with pytest.raises(UnknownSiteError, match="later blocks of llava change nothing"):
        resolve_linears(model, [f"vision.layers.{blocks - 1}.mlp"])


@pytest.mark.parametrize("everything", [False, True])
def test_every_unknown_site_is_named_at_once(everything):
    with pytest.raises(UnknownSiteError) as caught:
        resolve_parameters(
            tiny("llava"),
            ["layers.9.mlp", "nowhere", "vision.layers.77.mlp"],
            all_parameters=everything,
        )
    for name in ("layers.9.mlp", "nowhere", "vision.layers.77.mlp"):
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_every_preset_finds_its_sites(name):
    model = tiny(name, layers=9)
    for preset, config in METHODS["finetune"].presets.items():
        assert resolve_parameters(model, config.sites, all_parameters=config.all_parameters), preset
    for preset, config in METHODS["lora"].presets.items():
        assert resolve_linears(model, config.target_modules), preset
