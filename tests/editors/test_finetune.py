"""FT against LiveEdit's own run, and what is particular to it."""

import pytest
import torch
from safetensors.torch import load_file

from errata import adapters
from errata.adapters import from_module
from errata.editors import METHODS, configure, make_editor
from errata.editors.finetune import FinetuneConfig
from errata.editors.lora import LoraConfig
from errata.functional import Model, Query, bind
from errata.functional.errors import InvalidInputError, InvalidSettingsError, UnknownSiteError
from tests.adapters.test_parity import GOLDEN, as_bytes, golden, needs_golden


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def model() -> Model:
    return from_module(*adapters.tiny_model("llava"))


def edited(model: Model, asked: list[Query], **settings):
    editor = make_editor(configure("finetune", **settings))
    return editor.edit(model, editor.init(model, seeded()), asked)[0]


@needs_golden
def test_three_edits_in_sequence_are_liveedits():
    """Logits of the first record after each of three edits, and the last weight, as LiveEdit's.

    The weights stored for the first two edits are the last one's: the original hands out the tensor
    that it goes on writing to.
    """
    rows, tensors, module, processor = golden("mmedit_inputs_blip2", "blip2-micro")
    want = load_file(GOLDEN / "e2e_ft_vl_blip2.safetensors")
    model = from_module(module, processor, template="liveedit")
    images = processor.image_processor
    editor = make_editor(configure("finetune", preset="liveedit"))
    state, asked = editor.init(model, seeded()), []
    name = "language_model.model.decoder.layers.7.fc2.weight"
    for number in range(3):
        row = next(row for row in rows if row["key"] == f"r{number}.rel")
        pixels = tensors[f"r{number}.rel.pixel_values"][0]
        make_image = as_bytes(pixels, images.image_mean, images.image_std)
        asked.append(Query(row["prompt"], row["target"], (make_image,)))
        delta, state = editor.edit(model, state, asked[-1:])
        now = bind(model, delta)
        logits = now.decode(now.params, now.embed(now.params, now.preprocess(asked[:1])))
        tail = want[f"after{number}.r0.rel.logits_tail"][0][: logits.shape[1]]
        torch.testing.assert_close(logits[0], tail, rtol=1e-4, atol=1e-4)
    change = want[f"after2.weight.{name}"] - model.params[name]
    assert (delta.tensors[name] - change).norm() <= 1e-5 * change.norm()


def test_one_token_targets_are_the_same_to_ft_l_and_ft_m(model):
    asked = [Query("who is it?", "a")]
    assert model.preprocess(asked).labels.shape[1] == 1
    last, target = (
        edited(model, asked, objective=objective, num_steps=3, append_eos=False)
        for objective in ("last_prompt_token", "target_tokens")
    )
    assert all(torch.equal(last.tensors[name], target.tensors[name]) for name in last.tensors)


def test_the_clamp_holds_and_binds(model):
    asked = [Query("who is it?", "bo")]
    delta = edited(model, asked, norm_constraint=2e-3, lr=1e-3, num_steps=6)
    largest = max(tensor.abs().max() for tensor in delta.tensors.values())
    assert largest == pytest.approx(2e-3)


def test_an_edit_stops_at_its_loss(model):
    asked = [Query("who is it?", "bo")]
    long = edited(model, asked, num_steps=40, lr=1e-2, stop_loss=4.5)
    longer = edited(model, asked, num_steps=60, lr=1e-2, stop_loss=4.5)
    assert all(torch.equal(long.tensors[name], longer.tensors[name]) for name in long.tensors)


def test_weight_decay_pulls_the_whole_weight(model):
    """AdamW acts on W + d: with a learning rate too small to matter, d = -lr wd W."""
    asked = [Query("who is it?", "bo")]
    delta = edited(model, asked, num_steps=1, lr=1e-6, weight_decay=1e4, stop_loss=0.0)
    for name, change in delta.tensors.items():
        weight = model.params[name]
        torch.testing.assert_close(change, -1e-2 * weight, rtol=0, atol=2e-6)


def test_alignment_and_vision_change_only_what_they_name(model):
    asked = [Query("who is it?", "bo", (make_image(),))]
    projector = edited(model, asked, sites=("projector",), all_parameters=True, num_steps=2)
    assert all("multi_modal_projector" in name for name in projector.tensors)
    assert any(name.endswith("bias") for name in projector.tensors)
    vision = edited(model, asked, sites=("vision.layers.-1.mlp",), num_steps=2)
    assert vision.tensors
    assert all("vision" in name and "mlp" in name for name in vision.tensors)


def make_image():
    from PIL import Image

    return Image.new("RGB", (32, 32), (200, 30, 90))


def test_settings_are_refused_all_at_once(model):
    with pytest.raises(InvalidSettingsError, match=r"(?s)num_step.*num_steps.*lr") as refused:
        configure("finetune", num_step=3, lr=-1.0)
    assert "did you mean 'num_steps'" in str(refused.value)
    with pytest.raises(InvalidSettingsError, match="did you mean 'finetune'"):
        configure("finetun")
    with pytest.raises(UnknownSiteError, match="layers: 0 to 2"):
        edited(model, [Query("who?", "bo")], sites=("layers.9.mlp.down",))


@pytest.mark.parametrize("name", ["finetune", "lora"])
def test_presets_say_what_the_peers_do(name):
    for preset in METHODS[name].presets:
        config = configure(name, preset=preset)
        assert isinstance(config, FinetuneConfig | LoraConfig)
        assert preset == "default" or not config.append_eos


def test_side_by_side_starts_from_a_fresh_state(model):
    editor = make_editor(configure("finetune", num_steps=1))
    asked = [Query("who is it?", "bo")]
    _, state = editor.edit(model, editor.init(model, seeded()), asked)
    with pytest.raises(InvalidInputError, match="fresh state, and this one holds 1"):
        editor.edit_each(model, state, asked)


def test_sites_that_no_answer_depends_on_are_refused(model):
    """A question in words alone never meets the vision tower."""
    with pytest.raises(InvalidSettingsError, match="the first step changed nothing"):
        edited(model, [Query("who is it?", "bo")], sites=("vision.layers.-1.mlp",), num_steps=2)
