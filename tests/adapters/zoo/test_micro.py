"""The shipped micro models: small, offline, and knowing their world."""

import json
import os

import pytest
import torch
from PIL import Image

from errata.adapters.zoo.assets import WEIGHTS
from errata.adapters.zoo.configs import MICRO
from errata.adapters.zoo.micro import load_micro_parts, micro_names
from errata.bench.data.world import drawing
from errata.bench.data.world.world import World
from errata.functional.errors import UnsupportedModelError

BAR = 0.85


def read(processor, name: str, picture: Image.Image, question: str):
    """A question about one picture, as the family's makers would put it."""
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return processor(images=[picture], text=[text], return_tensors="pt")
    micro = MICRO[name]
    pictures = micro.opening + micro.image * micro.num_image_tokens + micro.closing
    inputs = processor.tokenizer(f"{pictures} {question}{micro.after}", return_tensors="pt")
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": processor.image_processor(picture, return_tensors="pt")["pixel_values"],
    }


def ask(module, processor, name: str, picture: Image.Image, question: str) -> str:
    """Hugging Face's own greedy answer."""
    inputs = read(processor, name, picture, question)
    with torch.no_grad():
        ids = module.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    new = ids[inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_models_promised_are_shipped():
    assert {"llava", "blip2", "qwen2_vl"} <= set(micro_names())


@pytest.mark.parametrize("name", micro_names())
def test_a_micro_model_is_small_and_reaches_the_bar(name):
    report = json.loads((WEIGHTS / name / "report.json").read_text())
    assert os.path.getsize(WEIGHTS / name / "model.safetensors") <= 8 * 2**20
    assert report["exact_match"]["edited"] >= BAR
    assert report["exact_match"]["edited (held-out questions)"] >= BAR


@pytest.mark.parametrize("name", micro_names())
def test_generate_answers_about_renderings_never_seen(name):
    module, processor = load_micro_parts(name)
    creatures = World().trained[::14]
    right = [
        ask(
            module,
            processor,
            name,
            drawing.creature(c.appearance, "fresh"),
            "where does this animal live?",
        )
        == c.home
        for c in creatures
    ]
    assert sum(right) >= 0.7 * len(right)  # 15 draws of a rate of about 0.9


@pytest.mark.parametrize("name", micro_names())
def test_a_micro_model_is_float32_in_eval_mode(name):
    module, _ = load_micro_parts(name)
    assert not module.training
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(UnsupportedModelError, match=r"named 'gpt5'; there are .*llava"):
        load_micro_parts("gpt5")
