"""The micro world: creatures with a stable look, facts about them, and questions about both.

Everything follows from a seed. The first 200 creatures are those the shipped models were trained
on; `World.creature(i)` goes on without end, for teaching new ones and for training editors.
"""

from __future__ import annotations

import functools
import random
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NUM_TRAINED = 200  # creatures in the training set of the shipped models
NUM_HELD_OUT = 60  # of these, the last ones, for which no two-hop question was ever trained


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

FACTS = ("name", "home", "food", "keeper", "sound")  # relations that must be remembered
ATTRIBUTES = ("color", "accent", "shape", "pattern", "ears")  # relations that can be seen
HOPS = {"land": "home", "job": "keeper", "food_kind": "food"}  # second hop -> the fact it follows
TEXT_RELATIONS = ("home", "food", "keeper", "sound")  # asked by name, without an image


class Appearance(NamedTuple):
    """What a creature looks like: the five attributes that every rendering of it shares."""

    shape: str
    color: str
    pattern: str
    accent: str
    ears: str


class Creature(NamedTuple):
    """A creature: its number in the world, its look and its five facts."""

    index: int
    appearance: Appearance
    name: str
    home: str
    food: str
    keeper: str
    sound: str


class TextFact(NamedTuple):
    """A fact asked without an image: its kind, its subject, the ways to ask it, the answer."""

    kind: str
    subject: str
    questions: tuple[str, ...]
    answer: str


@functools.cache
def load_facts() -> Mapping[str, Any]:
    """The word lists and question forms of `facts.toml`."""
    return tomllib.loads((Path(__file__).parent / "facts.toml").read_text("utf-8"))


def name_of(index: int) -> str:
    """The name of creature `index`: one to four syllables, never the same twice.

    Lengths repeat with period 20: 3 names of one syllable (while the 36 last), 9 of two (while
    the 320 last), 4 of three (up to index 5,120), 4 of four; later ones have four.
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
    """How many attributes tell two looks apart."""
    return sum(x != y for x, y in zip(a, b))


def has_clear_colors(appearance: Appearance) -> bool:
    """Whether the body and ear colours can be told apart at 64 pixels."""
    pair = {appearance.color, appearance.accent}
    return len(pair) == 2 and pair not in CONFUSABLE


class World:
    """Creatures, places and people that follow from `seed`.

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
        """Creature `index`; from 200 on one that no shipped model has seen.

        Its look differs from every trained one in at least two attributes.
        """
        if index < NUM_TRAINED:
            return self.trained[index]
        return self._draw_creature(index, [c.appearance for c in self.trained])

    # ---- answers

    def possible_answers(self, relation: str) -> tuple[str, ...]:
        """Every answer that `relation` can have among the trained creatures."""
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
        """The answer of a second hop, given the fact it follows: land of a city, job of a keeper.

        `chain` says the bridge before the hop ("falmont , norland").
        """
        if relation == "chain":
            return f"{bridge} , {self.land[bridge]}"
        table = {"land": self.land, "job": self.job, "food_kind": self.food_kind}[relation]
        return table[bridge]

    def answer(self, creature: Creature, relation: str) -> str:
        """The true answer of any relation about a creature."""
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
        """The ways to ask `relation` of a picture; `split` is "train" or "held".

        A question is a form x a subject phrase; the pair (i, j) is held out when
        (i + 2 j) mod 5 = 0, so both parts of a held-out question were seen, but not together.
        """
        return tuple(
            form.format(s=subject)
            for i, form in enumerate(load_facts()["questions"][relation])
            for j, subject in enumerate(load_facts()["subjects"])
            if ((i + 2 * j) % 5 == 0) == (split == "held")
        )

    def named_questions(self, relation: str, name: str) -> tuple[str, ...]:
        """The ways to ask `relation` of a creature by name, without an image."""
        return tuple(form.format(s=name) for form in load_facts()["questions"][relation])

    def statement(self, relation: str, subject: str, value: str) -> str:
        """A sentence that states a fact, for edits made in the context."""
        return load_facts()["statements"][relation].format(s=subject, v=value)

    def text_facts(self) -> tuple[TextFact, ...]:
        """Everything the models know as text: second hops, general knowledge, named creatures."""
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
