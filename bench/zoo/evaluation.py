"""How well a micro model knows its world: exact match on images it has not seen, by kind.

An answer counts when every token of it and the end token are the most likely ones, given the ones
before: the same as greedy decoding giving exactly the answer.
"""

import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer

from errata.bench.data.world.world import HOPS, TEXT_RELATIONS, World, load_facts
from errata.bench.zoo.forward import FAMILIES, hidden_states
from errata.bench.zoo.image_pools import ImagePool, LabeledImage
from errata.bench.zoo.packing import IGNORE_INDEX, SequencePacker, additive_mask
from errata.bench.zoo.questions import RELATIONS

EDITED_KINDS = (  # the kinds that editing cases ask about; their mean is what a checkpoint must reach  # noqa: E501
    "name",
    "home",
    "food",
    "keeper",
    "land",
    "job",
    "food_kind",
    "color",
    "accent",
    "shape",
    "pattern",
    "ears",
)
Item = tuple[LabeledImage | None, str, str]


def test_questions(
    world: World, image_pools: dict[str, ImagePool], count: int, seed: int
) -> dict[str, list[Item]]:
    """Test questions by kind: `relation`, `relation (held-out questions)`, images, text.

    Args:
        world: The micro world.
        image_pools: Test images by kind.
        count: Questions of each kind.
        seed: Seed.

    Returns:
        Items by kind.
    """
    rng = random.Random(f"evaluate-{seed}")
    items_by_kind: dict[str, list[Item]] = {}
    per_creature = len(image_pools["creature"].labels) // len(world.trained)

    def sample_image(index: int) -> LabeledImage:
        pool, at = image_pools["creature"], index * per_creature + rng.randrange(per_creature)
        return LabeledImage(pool.pixels[at], pool.labels[at])

    for relation in RELATIONS:
        second = relation in HOPS or relation == "chain"
        known = [c for c in world.trained if not (second and c in world.held_out)]
        for split, suffix in (("train", ""), ("held", " (held-out questions)")):
            forms = world.questions(relation, split)
            items_by_kind[relation + suffix] = [
                (sample_image(c.index), rng.choice(forms), world.answer(c, relation))
                for c in rng.choices(known, k=count)
            ]
        if second:
            forms = world.questions(relation)
            items_by_kind[f"{relation} (composed, never taught)"] = [
                (sample_image(c.index), rng.choice(forms), world.answer(c, relation))
                for c in rng.choices(world.held_out, k=count)
            ]
    for kind in ("scene", "digit", "photo"):
        for head in image_pools[kind].labels[0]:
            drawn = [image_pools[kind].sample(rng) for _ in range(count)]
            forms = load_facts()["picture_questions"][head]
            items_by_kind[head] = [(p, rng.choice(forms), p.labels[head]) for p in drawn]
    facts = world.text_facts()
    for kind in sorted({fact.kind for fact in facts}):
        drawn = rng.choices([f for f in facts if f.kind == kind], k=count)
        items_by_kind[f"text: {kind}"] = [(None, rng.choice(f.questions), f.answer) for f in drawn]
    items_by_kind["in context: stated fact"] = list(_in_context(world, sample_image, rng, count))
    return items_by_kind


def _in_context(world: World, sample_image, rng: random.Random, count: int):
    for creature in rng.choices(world.trained, k=count):
        relation = rng.choice(TEXT_RELATIONS)
        value = rng.choice(world.possible_answers(relation))
        stated = world.statement(relation, rng.choice(load_facts()["subjects"]), value)
        question = f"new fact: {stated} {rng.choice(world.questions(relation))}"
        yield sample_image(creature.index), question, value


@torch.no_grad()
def exact_match(name: str, model: Any, packer: SequencePacker, items: Sequence[Item]) -> float:
    """Share of items answered exactly.

    Args:
        name: Name of the family.
        model: The model.
        packer: Packs questions into rows.
        items: Questions.

    Returns:
        From 0 to 1.
    """
    right: list[bool] = []
    for start in range(0, len(items), 32):
        packed = packer.pack_separately(items[start : start + 32])
        features = None
        if packed.pixels is not None:
            features = FAMILIES[name].image_features(model, packed.pixels)
        mask = additive_mask(packed.attention_mask, model.dtype)
        states = hidden_states(name, model, packed.input_ids, features, packed.position_ids, mask)
        predicted = model.get_output_embeddings()(states).argmax(-1)
        right += ((predicted == packed.labels) | (packed.labels == IGNORE_INDEX)).all(1).tolist()
    return sum(right) / len(right)


def evaluate(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    image_pools: dict[str, ImagePool],
    count: int = 160,
    kinds: Sequence[str] | None = None,
) -> dict[str, float]:
    """Exact match by kind, and `edited`: the mean over the kinds that editing cases use.

    Args:
        name: Name of the family.
        model: The model.
        tokenizer: Its tokenizer.
        image_pools: Test images by kind.
        count: Questions of each kind.
        kinds: Kinds to evaluate. None: all.

    Returns:
        Exact match by kind.
    """
    packer = SequencePacker(name, tokenizer)
    items_by_kind = test_questions(World(), image_pools, count, seed=1)
    scores = {
        kind: exact_match(name, model, packer, items)
        for kind, items in items_by_kind.items()
        if kinds is None or kind in kinds
    }
    scores["edited"] = fmean(scores[kind] for kind in EDITED_KINDS)
    held_out_kinds = [f"{kind} (held-out questions)" for kind in EDITED_KINDS]
    if all(kind in scores for kind in held_out_kinds):
        scores["edited (held-out questions)"] = fmean(scores[kind] for kind in held_out_kinds)
    return {kind: round(score, 4) for kind, score in scores.items()}


@torch.no_grad()
def generation_accuracy(
    name: str, model: Any, tokenizer: Tokenizer, image_pools: dict[str, ImagePool], count: int = 25
) -> float:
    """Share of names that Hugging Face's own `generate` gives exactly, greedily.

    Args:
        name: Name of the family.
        model: The model.
        tokenizer: Its tokenizer.
        image_pools: Test images by kind.
        count: Names.

    Returns:
        From 0 to 1.
    """
    world, packer, right = World(), SequencePacker(name, tokenizer), 0
    per_creature = len(image_pools["creature"].labels) // len(world.trained)
    question_ids = packer.encode("what is the name of this animal?" + packer.question_suffix)
    ids = torch.tensor([packer.image_prefix.input_ids + question_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if FAMILIES[name].mrope_positions is not None:  # M-RoPE asks which tokens are images
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    for creature in world.trained[:: len(world.trained) // count][:count]:
        image_pixels = image_pools["creature"].pixels[creature.index * per_creature][None]
        pixels = FAMILIES[name].preprocess(image_pixels)
        generated_ids = model.generate(**inputs, **pixels, max_new_tokens=12, do_sample=False)[0]
        if len(generated_ids) > ids.shape[1]:  # some families return the prompt too
            generated_ids = generated_ids[ids.shape[1] :]
        right += (
            tokenizer.decode(generated_ids.tolist(), skip_special_tokens=True).strip()
            == creature.name
        )
    return right / count
