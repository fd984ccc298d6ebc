"""The zoo's training code: packing is exact, an interrupted run ends as an undisturbed one."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from errata.adapters.zoo.assets import FOLDER, TOKENIZER, WEIGHTS
from errata.adapters.zoo.configs import MICRO, fast_tokenizer
from errata.bench.data.world import drawing
from errata.bench.data.world.world import World
from errata.bench.zoo import image_pools
from errata.bench.zoo.accuracy_table import accuracy_table
from errata.bench.zoo.forward import FAMILIES, hidden_states, prepare
from errata.bench.zoo.muon import orthogonalize
from errata.bench.zoo.packing import IGNORE_INDEX, SequencePacker, additive_mask
from errata.bench.zoo.questions import QuestionSampler, Row
from errata.bench.zoo.tokenizer import train_tokenizer
from errata.bench.zoo.train import Recipe, Trainer

ASKED = [
    ("what is the name of this animal?", "morvex"),
    ("where does this animal live?", "port ash on mere"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture
def few_pictures(monkeypatch):
    monkeypatch.setattr(image_pools, "NUM_RENDERINGS", {"train": 1, "test": 1})
    monkeypatch.setattr(image_pools, "NUM_SCENES", {"train": 20, "test": 20})
    monkeypatch.setattr(image_pools, "NUM_CROPS", {"train": 1, "test": 1})
    monkeypatch.setattr(drawing, "NUM_TEST_DIGITS", 1797 - 30)
    monkeypatch.setattr(image_pools, "DIGIT_COPIES", {"train": 1, "test": 1})


@pytest.mark.parametrize("name", sorted(MICRO))
def test_a_packed_row_is_the_same_as_questions_asked_alone(name, tokenizer):
    torch.manual_seed(0)
    micro = MICRO[name]
    model = prepare(micro.module(micro.config(tokenizer))).eval()
    processor = micro.processor(fast_tokenizer(tokenizer, **micro.special_tokens))
    image = drawing.creature(World().trained[5].appearance, "packing")
    shown = image_pools.LabeledImage(np.asarray(image), {})
    packer = SequencePacker(name, tokenizer)
    packed = packer.pack([Row(shown, iter(ASKED))])
    with torch.no_grad():
        features = FAMILIES[name].image_features(model, packed.pixels)
        mask = additive_mask(packed.attention_mask, torch.float32)
        states = hidden_states(name, model, packed.input_ids, features, packed.position_ids, mask)
        logits = model.get_output_embeddings()(states)[0]
        at = len(packer.image_prefix.input_ids)
        for question, answer in ASKED:
            length = len(packer.encode(question + packer.question_suffix) + packer.encode(answer))
            inputs = read(processor, name, image, question, answer)
            alone = model(**inputs).logits[0, -length:]
            assert (
                packed.input_ids[0, at : at + length].tolist()
                == inputs["input_ids"][0, -length:].tolist()
            )
            torch.testing.assert_close(logits[at : at + length], alone, rtol=1e-4, atol=1e-4)
            at += length + 1


def read(processor, name: str, photo, question: str, answer: str):
    """A question with its answer, as the family's makers would put it."""
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return processor(images=[photo], text=[f"{text} {answer}"], return_tensors="pt")
    micro = MICRO[name]
    image_pools = micro.opening + micro.image * micro.num_image_tokens + micro.closing
    text = f"{image_pools} {question}{micro.after} {answer}"
    pixels = processor.image_processor(photo, return_tensors="pt")["pixel_values"]
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "pixel_values": pixels}


def test_labels_cover_answers_and_end_tokens_only(tokenizer):
    packer = SequencePacker("llava", tokenizer)
    packed = packer.pack([Row(None, iter(ASKED))])
    said = [i for _, answer in ASKED for i in [*packer.encode(answer), packer.end_id]]
    assert packed.labels[packed.labels != IGNORE_INDEX].tolist() == said


def test_two_hop_questions_are_never_asked_of_held_creatures(few_pictures, tmp_path):
    world = World()
    lessons = QuestionSampler(world, image_pools.load_pools(world, "train", tmp_path))
    rng = random.Random(0)
    hops = {q for r in ("land", "job", "food_kind", "chain") for q in world.questions(r)}
    asked = [lessons._sample_creature_question(rng, world.held_out[i % 60])[0] for i in range(2000)]
    assert not hops & set(asked)


def test_orthogonal_updates_have_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 32, 64)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_a_stopped_run_ends_as_an_undisturbed_one(few_pictures, tokenizer, tmp_path, monkeypatch):
    recipe = Recipe(
        vision_steps=2, vision_batch=4, joint_steps=3, joint_batch=2, length=64, save_every=1
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    Trainer("llava", tokenizer, whole, recipe).run()
    save = Trainer._save
    for stop in (("vision", 1), ("joint", 2), None):

        def stopping(self, stage, step, optimiser, stop=stop):
            save(self, stage, step, optimiser)
            if (stage, step) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "_save", stopping)
        trainer = Trainer("llava", tokenizer, parts, recipe)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
        else:
            trainer.run()
    one, other = (load_file(folder / "llava-joint.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def test_the_readme_shows_what_the_reports_say():
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert accuracy_table(WEIGHTS) in readme


def test_the_shipped_tokenizer_is_the_one_the_command_makes(tokenizer):
    assert train_tokenizer(World()).get_vocab() == tokenizer.get_vocab()
