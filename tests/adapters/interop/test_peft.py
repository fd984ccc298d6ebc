"""What PEFT loads from an export is the delta, bit for bit; what it cannot hold is refused."""

from __future__ import annotations

import copy
import json

import msgspec
import peft
import pytest
import safetensors.torch
import torch

from errata.adapters.interop.attachment import attach
from errata.adapters.interop.peft_export import SERVABLE_RANKS, export_peft
from errata.adapters.interop.peft_import import import_peft
from errata.functional import BaseModel, Delta, Header, merge
from errata.functional.deltas.stacking import stack
from errata.functional.errors import (
    BaseMismatchError,
    DeltaFileError,
    ErrataError,
    InvalidInputError,
    UnknownSiteError,
    UnsupportedKindError,
)
from errata.functional.kinds.schema import Dense
from tests.adapters.zoo_of_families.deltas import case, logits, lowrank, sites

FORMS = ("act", "act_fp32", "weight")
FAMILIES = ("llava", "qwen2_vl", "blip2", "llava_onevision", "qwen3_vl")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers the old way
    "ignore:The following (rank|alpha)_pattern keys did not match",  # it looks for modules only
)


def loaded(module, export):
    """PEFT's own loading, and the names of the factors it made."""
    made = peft.PeftModel.from_pretrained(
        copy.deepcopy(module),
        str(export.folder),
        autocast_adapter_dtype=export.autocast_adapter_dtype,
    )
    names = {n.replace(".default", "") for n, _ in made.named_parameters() if ".lora_" in n}
    return made, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_the_delta_bit_for_bit(name, form, dtype, tmp_path):
    module, model, _, kwargs = case(name, dtype)
    delta = lowrank(model, form)
    export = export_peft(delta, tmp_path / "adapter")
    with attach(module, delta):
        want = logits(module, kwargs)
    made, names = loaded(module, export)
    file = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {n.replace(".base_layer", "") for n in names} == set(file)  # none missing, none more
    assert torch.equal(logits(made, kwargs), want)
    assert not torch.equal(logits(module, kwargs), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_that_end_alike_are_told_apart(name, tmp_path):
    module, model, _, _ = case(name)
    paths = sites(model)
    tails = [path.rpartition(".")[2] for path in paths]
    alike = [path for path in model.card.linear_shapes if path.rpartition(".")[2] in tails]
    assert len(alike) > len(paths)  # PEFT's own suffix rule would take these, too
    for form in FORMS:
        _, names = loaded(module, export_peft(lowrank(model, form), tmp_path / form))
        assert {n.partition(".lora_")[0].removeprefix("base_model.model.") for n in names} == set(
            paths
        )


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_is_the_same_delta(form, tmp_path):
    _, model, _, _ = case("llava")
    delta = merge(lowrank(model, form, seed=1, id="a"), lowrank(model, form, seed=2, id="b"))
    export_peft(delta, tmp_path / "adapter")
    back = import_peft(tmp_path / "adapter")
    assert back.header == delta.header
    assert all(torch.equal(back.tensors[name], x) for name, x in delta.tensors.items())


def test_transposed_maps_are_exported_too(tmp_path):
    module, model, _, kwargs = case("gpt2")
    delta = lowrank(model, "act", paths=["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"])
    export = export_peft(delta, tmp_path / "adapter")
    with attach(module, delta):
        want = logits(module, kwargs)
    assert torch.equal(logits(loaded(module, export)[0], kwargs), want)
    with pytest.raises(UnsupportedKindError, match="stored transposed"):
        export_peft(
            Delta(msgspec.structs.replace(delta.header, arithmetic="weight"), delta.tensors),
            tmp_path / "no",
        )


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_an_adapter_trained_with_peft_is_imported(name, tmp_path):
    module, model, _, kwargs = case(name)
    path = sites(model)[1]
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=[path], init_lora_weights=False, task_type=None
    )
    made = peft.get_peft_model(copy.deepcopy(module), config)
    made.save_pretrained(tmp_path / "adapter")
    want = logits(made, kwargs)
    delta = import_peft(tmp_path / "adapter", model)
    assert [entry.name for entry in delta.header.entries] == [f"{path}.weight"]
    assert delta.header.arithmetic == "act_fp32"
    with attach(module, delta):
        assert torch.equal(logits(module, kwargs), want)  # a scale of 4 folds into B exactly


def test_a_pattern_anchored_at_the_start_is_a_whole_path_as_in_peft(tmp_path):
    module, model, _, kwargs = case("llava")
    path = next(path for path in model.card.linear_shapes if path.endswith("q_proj"))
    config = peft.LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj"],
        init_lora_weights=False,
        alpha_pattern={"^q_proj": 16, f"^{path}": 8},
    )
    made = peft.get_peft_model(copy.deepcopy(module), config)
    made.save_pretrained(tmp_path / "a")
    delta = import_peft(tmp_path / "a", model)
    want = logits(made, kwargs)
    with attach(module, delta):
        assert torch.equal(logits(module, kwargs), want)


def test_names_of_the_checkpoint_are_understood(tmp_path):
    """PEFT itself leaves such a projector at zero, with a warning."""
    _, model, _, _ = case("llava")
    delta = lowrank(model, "act_fp32", paths=["model.multi_modal_projector.linear_1"])
    export_peft(delta, tmp_path / "adapter")
    (tmp_path / "adapter" / "errata.json").unlink()
    rename(tmp_path / "adapter", "model.multi_modal_projector", "multi_modal_projector")
    back = import_peft(tmp_path / "adapter", model)
    assert [entry.name for entry in back.header.entries] == [
        "model.multi_modal_projector.linear_1.weight"
    ]
    assert back.header.base == delta.header.base


def rename(folder, old, new):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({n.replace(old, new): x for n, x in tensors.items()}, path)


def test_the_serving_profile_is_what_servers_take(tmp_path):
    module, model, inputs, kwargs = case("llava")
    paths = [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.mlp.down_proj",
    ]
    delta = lowrank(model, "act", paths=paths)
    with pytest.raises(InvalidInputError, match=r"k_proj.*v_proj"):
        export_peft(delta, tmp_path / "lone", "serving")
    shapes = {f"{path}.weight": shape for path, shape in model.card.linear_shapes.items()}
    export = export_peft(delta, tmp_path / "s", "serving", shapes=shapes, dtype=torch.float32)
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] in SERVABLE_RANKS
    assert not config.keys() & {"rank_pattern", "alpha_pattern", "target_parameters"}
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
    file = safetensors.torch.load_file(tmp_path / "s" / "adapter_model.safetensors")
    assert {x.shape[0 if ".lora_A." in n else 1] for n, x in file.items()} == {8}
    assert sum(bool(x.any()) for x in file.values()) == 4
    assert export.inexact == ()
    with attach(module, delta):
        want = logits(module, kwargs)[inputs.attention_mask]
    with attach(module, import_peft(tmp_path / "s", model, arithmetic="act")):
        got = logits(module, kwargs)[inputs.attention_mask]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # zero rows change GEMM shapes


def test_the_serving_profile_says_what_is_inexact_and_refuses_towers(tmp_path):
    _, model, _, _ = case("llava")
    down = ["model.language_model.layers.1.mlp.down_proj"]
    assert (
        "rounding"
        in export_peft(lowrank(model, "weight", paths=down), tmp_path / "a", "serving").inexact[0]
    )
    with pytest.raises(UnsupportedKindError, match="outside the decoder"):
        export_peft(lowrank(model), tmp_path / "b", "serving")
    with pytest.raises(UnsupportedKindError, match="compress"):
        export_peft(lowrank(model, paths=down, rank=513), tmp_path / "c", "serving")


def test_what_a_lora_can_not_express_is_refused_with_the_alternative(tmp_path):
    _, model, _, _ = case("llava")
    one = lowrank(model)
    dense = Delta(
        Header(
            base=BaseModel(id="m"), entries=(Dense(name="w", checkpoint_name="w", shape=(2, 2)),)
        ),
        {"w": torch.ones(2, 2)},
    )
    for delta, reason in (
        (dense, "compress"),
        (stack([one, one]), "unstack"),
        (Delta(Header(base=BaseModel(id="m")), {}), "changes nothing"),
    ):
        with pytest.raises(UnsupportedKindError, match=reason):
            export_peft(delta, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_existing_folder_is_never_written_into(tmp_path):
    _, model, _, _ = case("llava")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="must not exist yet"):
        export_peft(lowrank(model), tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def broken(folder, **change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **change}))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"use_dora": True}, UnsupportedKindError, "use_dora"),
        ({"bias": "all"}, UnsupportedKindError, "bias"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedKindError, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, UnsupportedKindError, "pissa"),
        ({"peft_type": "LOHA"}, UnsupportedKindError, "LOHA"),
        ({"some_new_thing": 3}, UnsupportedKindError, "some_new_thing"),
        ({"alpha_pattern": {"(a+)+$": 4}}, UnsupportedKindError, "regular expression"),
        ({"lora_alpha": "lots"}, DeltaFileError, "alpha must be a number"),
    ],
)
def test_foreign_features_are_refused_by_name(tmp_path, change, error, reason):
    _, model, _, _ = case("llava")
    export_peft(lowrank(model, "act"), tmp_path / "a")
    (tmp_path / "a" / "errata.json").unlink()
    broken(tmp_path / "a", **{"alpha_pattern": {}, **change})
    with pytest.raises(error, match=reason):
        import_peft(tmp_path / "a", model)


def test_broken_and_forged_adapters_are_refused_by_name(tmp_path):
    _, model, _, _ = case("llava")
    export_peft(lowrank(model), tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DeltaFileError, match=r"errata.json"):
        import_peft(tmp_path / "a")
    weights.write_bytes(good[:-9])
    with pytest.raises(DeltaFileError, match=r"adapter_model.safetensors"):
        import_peft(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(DeltaFileError, match="nested too deeply"):
        import_peft(tmp_path / "a")
    with pytest.raises(ErrataError, match="nowhere"):
        import_peft(tmp_path / "nowhere")


def test_an_adapter_for_another_model_is_refused(tmp_path):
    _, model, _, _ = case("llava")
    export_peft(lowrank(model), tmp_path / "a")
    with pytest.raises(BaseMismatchError, match="made for"):
        import_peft(tmp_path / "a", case("blip2").model)
    assert import_peft(tmp_path / "a", model, arithmetic="weight").header.arithmetic == "weight"
    (tmp_path / "a" / "errata.json").unlink()
    with pytest.raises(UnknownSiteError, match="no linear map"):
        import_peft(tmp_path / "a", case("blip2").model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_with_peft_gives_the_weight_form(dtype, tmp_path):
    module, model, _, kwargs = case("llava", dtype)
    delta = lowrank(model, "act")
    made, _ = loaded(module, export_peft(delta, tmp_path / "adapter"))
    weight = Delta(msgspec.structs.replace(delta.header, arithmetic="weight"), delta.tensors)
    with attach(module, weight):
        want = logits(module, kwargs)
    assert torch.equal(logits(made.merge_and_unload(safe_merge=True), kwargs), want)
