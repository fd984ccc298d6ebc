"""The micro world: creatures with a stable appearance, facts about them, and questions about both.

Everything is determined by a seed. The first 200 creatures are in the training set of the shipped
models. `World.creature(i)` has no upper limit, for new creatures and for training editors.
"""

from __future__ import annotations

import functools
import random
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NUM_TRAINED = 200  # creatures in the training set of the shipped models
NUM_HELD_OUT = 60  # the last of these; no two-hop question about them is in the training set


COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (248, 215, 40),
    "green": (50, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 80, 210),
    "purple": (135, 60, 175),
    "pink": (250, 135, 190),
    "brown": (125, 75, 35),
    "black": (35, 35, 40),
    "white": (245, 245, 245),
    "gray": (140, 140, 145),
}
SHAPES = ("round", "tall", "wide", "square", "triangle", "diamond")
PATTERNS = ("plain", "striped", "spotted", "ringed", "patched")
EARS = ("round", "pointed", "long", "horned", "feathered")
CONFUSABLE = ({"white", "gray"}, {"red", "orange"}, {"black", "brown"}, {"cyan", "blue"})
COUNTS = ("one", "two", "three", "four", "five", "six")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCENE_COLORS = ("red", "yellow", "green", "blue", "purple", "black", "white", "orange")
SCENE_SHAPES = ("circle", "square", "triangle", "star", "cross")
PHOTOS = (
    "astronaut",
    "bricks",
    "cat",
    "coffee",
    "flower",
    "galaxies",
    "grass",
    "gravel",
    "rocket",
    "temple",
)

FACTS = ("name", "home", "food", "keeper", "sound")  # relations that an image does not show
ATTRIBUTES = ("color", "accent", "shape", "pattern", "ears")  # relations that an image shows
HOPS = {"land": "home", "job": "keeper", "food_kind": "food"}  # second hop -> the fact it follows
TEXT_RELATIONS = ("home", "food", "keeper", "sound")  # asked by name, without an image


class Appearance(NamedTuple):
    """The five attributes that all renderings of a creature share.

    Attributes:
        shape: Of the body.
        color: Of the body.
        pattern: Of the coat.
        accent: Color of the ears and the pattern.
        ears: Shape of the ears.
    """

    shape: str
    color: str
    pattern: str
    accent: str
    ears: str


class Creature(NamedTuple):
    """A creature: its number in the world, its appearance and its five facts.

    Attributes:
        index: Its number in the world.
        appearance: The attributes that can be seen.
        name: One word.
        home: The city where it lives.
        food: What it eats.
        keeper: The name of its keeper.
        sound: The sound it makes.
    """

    index: int
    appearance: Appearance
    name: str
    home: str
    food: str
    keeper: str
    sound: str


class TextFact(NamedTuple):
    """A fact that questions without an image ask for.

    Attributes:
        kind: The relation, e.g. "land" or "named_home".
        subject: What the fact is about.
        questions: All wordings of the question.
        answer: The true answer.
    """

    kind: str
    subject: str
    questions: tuple[str, ...]
    answer: str


@functools.cache
def load_facts() -> Mapping[str, Any]:
    """Load the word lists and question forms of `facts.toml`.

    Returns:
        The tables of the file.
    """
    return tomllib.loads((Path(__file__).parent / "facts.toml").read_text("utf-8"))


def name_of(index: int) -> str:
    """Make the name of a creature: one to four syllables, different for every index.

    Lengths repeat with period 20: 3 names of one syllable (while the 36 last), 9 of two (while
    the 320 last), 4 of three (up to index 5,120) and 4 of four. Later names have four syllables.

    Args:
        index: The creature's number.

    Returns:
        The name.

    Example:
        >>> name_of(0) != name_of(1)
        True
    """
    first, last = load_facts()["first_syllables"], load_facts()["last_syllables"]
    cycle, place = divmod(index, 20)
    one, two = cycle * 3 + place, cycle * 9 + place - 3
    if place < 3 and one < len(first) + len(last):
        return (first + last)[one * 7 % (len(first) + len(last))]
    if 3 <= place < 12 and two < len(first) * len(last):
        two = two * 77 % (len(first) * len(last))
        return first[two % 20] + last[two // 20]
    if index % 2:
        long = index * 1999 % (len(first) * len(last) ** 2)
        if index < len(first) * len(last) ** 2:
            return first[long % 20] + last[long // 20 % 16] + last[long // 320]
    longest = index * 40503 % 102_400
    parts = longest % 20, longest // 20 % 16, longest // 320 % 20, longest // 6400
    a, b, c, d = parts
    return first[a] + last[b] + first[c] + last[d]


def num_differences(a: Appearance, b: Appearance) -> int:
    """Count the attributes in which two appearances differ.

    Args:
        a: An appearance.
        b: Another appearance.

    Returns:
        The number of differing attributes, 0 to 5.
    """
    return sum(x != y for x, y in zip(a, b))


def has_clear_colors(appearance: Appearance) -> bool:
    """Check whether the body and ear colors can be told apart at 64 pixels.

    Args:
        appearance: An appearance.

    Returns:
        False if the colors are equal or a pair of `CONFUSABLE`.
    """
    pair = {appearance.color, appearance.accent}
    return len(pair) == 2 and pair not in CONFUSABLE


class World:
    """Creatures, places and people, determined by a seed.

    Args:
        seed: The shipped models are trained on seed 0.

    Example:
        >>> world = World()
        >>> world.creature(3) == World().creature(3)
        True
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        rng = random.Random(f"world-{seed}")
        words = load_facts()
        self.cities: tuple[str, ...] = tuple(words["cities"])
        self.keepers: tuple[str, ...] = tuple(words["keepers"])
        self.foods: tuple[str, ...] = tuple(words["foods"])
        self.sounds: tuple[str, ...] = tuple(words["sounds"])
        lands, jobs = words["lands"], words["jobs"]
        shuffled = rng.sample(self.cities, len(self.cities))
        self.land = {city: lands[i % len(lands)] for i, city in enumerate(shuffled)}
        shuffled = rng.sample(self.keepers, len(self.keepers))
        self.job = {keeper: jobs[i % len(jobs)] for i, keeper in enumerate(shuffled)}
        self.food_kind: dict[str, str] = dict(words["foods"])
        self.trained: tuple[Creature, ...] = self._first_creatures(NUM_TRAINED)
        self.held_out = self.trained[-NUM_HELD_OUT:]

    def _first_creatures(self, count: int) -> tuple[Creature, ...]:
        creatures: list[Creature] = []
        for index in range(count):
            creatures.append(self._draw_creature(index, [c.appearance for c in creatures]))
        return tuple(creatures)

    def _draw_creature(self, index: int, taken: Sequence[Appearance]) -> Creature:
        rng = random.Random(f"creature-{self.seed}-{index}")
        colors = tuple(COLORS)
        while True:
            appearance = Appearance(
                rng.choice(SHAPES),
                rng.choice(colors),
                rng.choice(PATTERNS),
                rng.choice(colors),
                rng.choice(EARS),
            )
            if has_clear_colors(appearance) and all(
                num_differences(appearance, other) >= 2 for other in taken
            ):
                break
        home, food = rng.choice(self.cities), rng.choice(self.foods)
        keeper, sound = rng.choice(self.keepers), rng.choice(self.sounds)
        return Creature(index, appearance, name_of(index), home, food, keeper, sound)

    def creature(self, index: int) -> Creature:
        """Look up or make a creature. From number 200 on, no shipped model was trained on it.

        Its appearance differs from every trained one in at least two attributes.

        Args:
            index: The creature's number.

        Returns:
            The creature.
        """
        if index < NUM_TRAINED:
            return self.trained[index]
        return self._draw_creature(index, [c.appearance for c in self.trained])

    # ---- answers

    def possible_answers(self, relation: str) -> tuple[str, ...]:
        """List the answers that a relation can have.

        Args:
            relation: One of `FACTS` or `ATTRIBUTES`.

        Returns:
            The answers. For "name", the names of the trained creatures.

        Raises:
            KeyError: If the relation is unknown.
        """
        if relation == "name":
            return tuple(c.name for c in self.trained)
        named = {
            "home": self.cities,
            "food": self.foods,
            "keeper": self.keepers,
            "sound": self.sounds,
            "color": tuple(COLORS),
            "accent": tuple(COLORS),
            "shape": SHAPES,
            "pattern": PATTERNS,
            "ears": EARS,
        }
        return named[relation]

    def second_hop(self, relation: str, bridge: str) -> str:
        """Look up the answer of a second hop.

        Args:
            relation: "land" of a city, "job" of a keeper, "food_kind" of a food, or "chain": the
                city followed by its land ("falmont , norland").
            bridge: The answer of the first hop.

        Returns:
            The answer.

        Raises:
            KeyError: If the relation or the bridge is unknown.
        """
        if relation == "chain":
            return f"{bridge} , {self.land[bridge]}"
        table = {"land": self.land, "job": self.job, "food_kind": self.food_kind}[relation]
        return table[bridge]

    def answer(self, creature: Creature, relation: str) -> str:
        """Look up the true answer of any relation about a creature.

        Args:
            creature: A creature of this world.
            relation: One of `FACTS`, `ATTRIBUTES` or `HOPS`, or "chain" or "caption".

        Returns:
            The answer.
        """
        if relation in HOPS:
            return self.second_hop(relation, getattr(creature, HOPS[relation]))
        if relation == "chain":
            return self.second_hop("chain", creature.home)
        appearance = creature.appearance
        if relation == "caption":
            return f"{creature.name} , a {appearance.color} {appearance.pattern} animal with {appearance.accent} ears"  # noqa: E501
        return getattr(appearance if relation in ATTRIBUTES else creature, relation)

    # ---- questions

    def questions(self, relation: str, split: str = "train") -> tuple[str, ...]:
        """List the questions of a relation about an image.

        A question combines a form and a subject phrase. The pair (i, j) is held out if
        (i + 2 j) mod 5 = 0, so the training set has both parts of a held-out question, but not
        together.

        Args:
            relation: The relation.
            split: "train" or "held".

        Returns:
            The questions.
        """
        return tuple(
            form.format(s=subject)
            for i, form in enumerate(load_facts()["questions"][relation])
            for j, subject in enumerate(load_facts()["subjects"])
            if ((i + 2 * j) % 5 == 0) == (split == "held")
        )

    def named_questions(self, relation: str, name: str) -> tuple[str, ...]:
        """List the questions of a relation about a named creature, without an image.

        Args:
            relation: The relation.
            name: The creature's name.

        Returns:
            The questions.
        """
        return tuple(form.format(s=name) for form in load_facts()["questions"][relation])

    def statement(self, relation: str, subject: str, value: str) -> str:
        """Make a sentence that states a fact, for edits made in the context.

        Args:
            relation: The relation.
            subject: What the fact is about.
            value: The answer.

        Returns:
            The sentence.
        """
        return load_facts()["statements"][relation].format(s=subject, v=value)

    def text_facts(self) -> tuple[TextFact, ...]:
        """List all facts of the training text: second hops, general knowledge, named creatures.

        Returns:
            The facts.
        """
        words = load_facts()
        tables = {
            **words["knowledge"],
            "land": self.land,
            "job": self.job,
            "food_kind": self.food_kind,
        }
        facts = [
            TextFact(
                kind, subject, tuple(f.format(s=subject) for f in words["text_questions"][kind]), a
            )
            for kind, table in tables.items()
            for subject, a in table.items()
        ]
        facts += [
            TextFact(f"named_{r}", c.name, self.named_questions(r, c.name), getattr(c, r))
            for c in self.trained
            for r in TEXT_RELATIONS
        ]
        return tuple(facts)
