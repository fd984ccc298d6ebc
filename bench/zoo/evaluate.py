"""How well a micro model knows its world: exact match on pictures it has not seen, by kind.

An answer counts when every token of it and the end token are the most likely ones, given the ones
before: the same as greedy decoding giving exactly the answer.
"""

import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer

from errata.adapters.zoo.world import HOPS, TEXT_RELATIONS, World, lore
from errata.bench.zoo.families import FAMILIES, hidden
from errata.bench.zoo.lessons import RELATIONS
from errata.bench.zoo.packing import IGNORE, Packer, additive
from errata.bench.zoo.pictures import Picture, Pool

EDITED = (  # the kinds that editing cases ask about; their mean is what a checkpoint must reach
    "name", "home", "food", "keeper", "land", "job", "food_kind",
    "color", "accent", "shape", "pattern", "ears",
)  # fmt: skip
Item = tuple[Picture | None, str, str]


def questions(world: World, pools: dict[str, Pool], count: int, seed: int) -> dict[str, list[Item]]:
    """Test questions by kind: `relation`, `relation (held-out questions)`, pictures, text."""
    rng = random.Random(f"evaluate-{seed}")
    asked: dict[str, list[Item]] = {}
    per_creature = len(pools["creature"].labels) // len(world.trained)

    def about(index: int) -> Picture:
        pool, at = pools["creature"], index * per_creature + rng.randrange(per_creature)
        return Picture(pool.pixels[at], pool.labels[at])

    for relation in RELATIONS:
        second = relation in HOPS or relation == "chain"
        known = [c for c in world.trained if not (second and c in world.held)]
        for split, suffix in (("train", ""), ("held", " (held-out questions)")):
            forms = world.questions(relation, split)
            asked[relation + suffix] = [
                (about(c.index), rng.choice(forms), world.answer(c, relation))
                for c in rng.choices(known, k=count)
            ]
        if second:
            forms = world.questions(relation)
            asked[f"{relation} (composed, never taught)"] = [
                (about(c.index), rng.choice(forms), world.answer(c, relation))
                for c in rng.choices(world.held, k=count)
            ]
    for kind in ("scene", "digit", "photo"):
        for head in pools[kind].labels[0]:
            drawn = [pools[kind].pick(rng) for _ in range(count)]
            forms = lore()["picture_questions"][head]
            asked[head] = [(p, rng.choice(forms), p.labels[head]) for p in drawn]
    facts = world.text_facts()
    for kind in sorted({fact.kind for fact in facts}):
        drawn = rng.choices([f for f in facts if f.kind == kind], k=count)
        asked[f"text: {kind}"] = [(None, rng.choice(f.questions), f.answer) for f in drawn]
    asked["in context: stated fact"] = list(_in_context(world, about, rng, count))
    return asked


def _in_context(world: World, about, rng: random.Random, count: int):
    for creature in rng.choices(world.trained, k=count):
        relation = rng.choice(TEXT_RELATIONS)
        value = rng.choice(world.values(relation))
        stated = world.statement(relation, rng.choice(lore()["subjects"]), value)
        question = f"new fact: {stated} {rng.choice(world.questions(relation))}"
        yield about(creature.index), question, value


@torch.no_grad()
def exact_match(name: str, model: Any, packer: Packer, items: Sequence[Item]) -> float:
    """Share of items answered exactly."""
    right: list[bool] = []
    for start in range(0, len(items), 32):
        packed = packer.alone(items[start : start + 32])
        features = None
        if packed.pixels is not None:
            features = FAMILIES[name].features(model, packed.pixels)
        mask = additive(packed.allowed, model.dtype)
        states = hidden(name, model, packed.ids, features, packed.positions, mask)
        said = model.get_output_embeddings()(states).argmax(-1)
        right += ((said == packed.labels) | (packed.labels == IGNORE)).all(1).tolist()
    return sum(right) / len(right)


def evaluate(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    pools: dict[str, Pool],
    count: int = 160,
    kinds: Sequence[str] | None = None,
) -> dict[str, float]:
    """Exact match by kind, and `edited`: the mean over the kinds that editing cases use."""
    packer = Packer(name, tokenizer)
    asked = questions(World(), pools, count, seed=1)
    scores = {
        kind: exact_match(name, model, packer, items)
        for kind, items in asked.items()
        if kinds is None or kind in kinds
    }
    scores["edited"] = fmean(scores[kind] for kind in EDITED)
    held = [f"{kind} (held-out questions)" for kind in EDITED]
    if all(kind in scores for kind in held):
        scores["edited (held-out questions)"] = fmean(scores[kind] for kind in held)
    return {kind: round(score, 4) for kind, score in scores.items()}


@torch.no_grad()
def generated(
    name: str, model: Any, tokenizer: Tokenizer, pools: dict[str, Pool], count: int = 25
) -> float:
    """Share of names that Hugging Face's own `generate` gives exactly, greedily."""
    world, packer, right = World(), Packer(name, tokenizer), 0
    per_creature = len(pools["creature"].labels) // len(world.trained)
    asked = packer.encode("what is the name of this animal?" + packer.after)
    ids = torch.tensor([packer.seen.ids + asked])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if FAMILIES[name].axes is not None:  # M-RoPE asks which tokens are pictures
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    for creature in world.trained[:: len(world.trained) // count][:count]:
        picture = pools["creature"].pixels[creature.index * per_creature][None]
        pixels = FAMILIES[name].pixels(picture)
        said = model.generate(**inputs, **pixels, max_new_tokens=12, do_sample=False)[0]
        if len(said) > ids.shape[1]:  # some families return the prompt too
            said = said[ids.shape[1] :]
        right += tokenizer.decode(said.tolist(), skip_special_tokens=True).strip() == creature.name
    return right / count
