"""What the joint stage asks: rows of one image (or none), many questions and their answers."""

import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from errata.bench.data.world.world import (
    ATTRIBUTES,
    FACTS,
    HOPS,
    NUM_HELD_OUT,
    NUM_TRAINED,
    TEXT_RELATIONS,
    Creature,
    TextFact,
    World,
    load_facts,
)
from errata.bench.zoo.image_pools import ImagePool, LabeledImage

ROWS = {"creature": 11.0, "text": 4.0, "scene": 1.8, "digit": 1.6, "photo": 0.4}
RELATIONS = {
    "name": 3.0,
    "home": 2.0,
    "food": 2.0,
    "keeper": 2.0,
    "sound": 1.5,
    "color": 0.8,
    "accent": 0.8,
    "shape": 0.8,
    "pattern": 0.8,
    "ears": 1.0,
    "land": 1.2,
    "job": 1.2,
    "food_kind": 1.2,
    "chain": 1.2,
    "caption": 0.3,
}
IN_CONTEXT_RATIO = 0.12  # share of questions that come with a new fact
MAX_QUESTIONS_PER_ROW = 40  # more questions than a row can hold


class Row(NamedTuple):
    """One packed row: an image or none, and an endless enough run of (question, answer)."""

    image: LabeledImage | None
    questions: Iterator[tuple[str, str]]


class QuestionSampler:
    """Draws rows from the world; every draw comes from the random generator handed in."""

    def __init__(self, world: World, image_pools: Mapping[str, ImagePool]):
        self.world, self.image_pools = world, image_pools
        self.facts: dict[str, list[TextFact]] = {}
        for fact in world.text_facts():
            self.facts.setdefault(fact.kind, []).append(fact)
        self.kinds = list(self.facts)
        self.weights = [len(self.facts[kind]) ** 0.75 for kind in self.kinds]

    def sample_row(self, rng: random.Random) -> Row:
        """Draw a row: an image or none, and questions about it.

        Args:
            rng: Source of randomness.

        Returns:
            The row.
        """
        kind = rng.choices(list(ROWS), list(ROWS.values()))[0]
        if kind == "text":
            return Row(
                None, (self._sample_text_question(rng) for _ in range(MAX_QUESTIONS_PER_ROW))
            )
        picture = self.image_pools[kind].sample(rng)
        if kind == "creature":
            creature = self.world.trained[int(picture.labels["creature"])]
            return Row(
                picture,
                (
                    self._sample_creature_question(rng, creature)
                    for _ in range(MAX_QUESTIONS_PER_ROW)
                ),
            )
        return Row(picture, self._image_questions(rng, picture))

    def _image_questions(
        self, rng: random.Random, image: LabeledImage
    ) -> Iterator[tuple[str, str]]:
        """Each question about a scene, digit or photograph once, in random order."""
        asked = [
            (form, answer)
            for head, answer in image.labels.items()
            for form in load_facts()["picture_questions"][head]
        ]
        yield from rng.sample(asked, len(asked))

    def _sample_creature_question(self, rng: random.Random, creature: Creature) -> tuple[str, str]:
        if rng.random() < IN_CONTEXT_RATIO:
            return self._sample_in_context_question(rng, creature)
        taught = list(RELATIONS)
        if creature.index >= NUM_TRAINED - NUM_HELD_OUT:
            taught = [r for r in taught if r not in HOPS and r != "chain"]
        relation = rng.choices(taught, [RELATIONS[r] for r in taught])[0]
        question = rng.choice(self.world.questions(relation))
        return question, self.world.answer(creature, relation)

    def _sample_in_context_question(
        self, rng: random.Random, creature: Creature
    ) -> tuple[str, str]:
        """A question after a new fact: about it, about its second hop, or about something else."""
        world, relation = self.world, rng.choice(FACTS)
        value = rng.choice(world.possible_answers(relation))
        stated = world.statement(relation, rng.choice(load_facts()["subjects"]), value)
        hop = {first: second for second, first in HOPS.items()}.get(relation)
        choice = rng.random()
        if choice < 0.5:
            asked, answer = relation, value
        elif choice < 0.7 and hop:
            asked, answer = hop, world.second_hop(hop, value)
        else:
            asked = rng.choice([r for r in (*FACTS, *ATTRIBUTES) if r != relation])
            answer = world.answer(creature, asked)
        return f"new fact: {stated} {rng.choice(world.questions(asked))}", answer

    def _sample_text_question(self, rng: random.Random) -> tuple[str, str]:
        fact = rng.choice(self.facts[rng.choices(self.kinds, self.weights)[0]])
        if rng.random() >= IN_CONTEXT_RATIO:
            return rng.choice(fact.questions), fact.answer
        creature, relation = rng.choice(self.world.trained), rng.choice(TEXT_RELATIONS)
        value = rng.choice(self.world.possible_answers(relation))
        stated = self.world.statement(relation, creature.name, value)
        if rng.random() < 0.6 or fact.subject == creature.name:
            question = rng.choice(self.world.named_questions(relation, creature.name))
            return f"new fact: {stated} {question}", value
        return f"new fact: {stated} {rng.choice(fact.questions)}", fact.answer
