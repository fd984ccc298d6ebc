"""The shipped micro models: small, offline, and knowing their world."""

import json
import os

import pytest
import torch
from PIL import Image

from errata.adapters.zoo import WEIGHTS, draw, micro_names, micro_parts
from errata.adapters.zoo.configs import MICRO
from errata.adapters.zoo.world import World
from errata.functional.errors import ModelUnsupported

BAR = 0.85


def prompt(processor, name: str, question: str) -> str:
    """A question about one picture, as the family's processor wants it."""
    if not processor.chat_template:
        return f"{MICRO[name].before} {question} {MICRO[name].after}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turn = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def ask(module, processor, name: str, picture: Image.Image, question: str) -> str:
    """Hugging Face's own greedy answer."""
    text = prompt(processor, name, question)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
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
    module, processor = micro_parts(name)
    creatures = World().trained[::14]
    right = [
        ask(module, processor, name, draw.creature(c.look, "fresh"), "where does this animal live?")
        == c.home
        for c in creatures
    ]
    assert sum(right) >= 0.7 * len(right)  # 15 draws of a rate of about 0.9


@pytest.mark.parametrize("name", micro_names())
def test_a_micro_model_is_float32_in_eval_mode(name):
    module, _ = micro_parts(name)
    assert not module.training
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ModelUnsupported, match=r"named 'gpt5'; there are .*llava"):
        micro_parts("gpt5")
