"""An editing benchmark made from the micro world: deterministic from a seed, drawn on demand.

A case changes one fact about one creature in an image ("where does this animal live?" -> another
city) and evaluates related questions. Targets are one to four tokens long in the zoo's tokenizer,
in equal shares as far as a relation has such values.

    reliability           the edit's own image and question (the protocol evaluates `case.edit`)
    rephrase              the same image, question forms held out from the model's training
    image_rephrase        the same question, other renderings of the creature
    text_locality         no image: the creature's other facts by name, the same relation of other
                          names, the second hop of the new value, general knowledge
    same_entity_locality  the same image, other relations
    hard_locality         the same relation of other creatures, including the two most similar
    image_locality        a handwritten digit, a scene of counted shapes, a photograph
    portability           the second hop of the new value (land of the new city). Absent if a
                          relation has none. The base model guesses some, so compare with its rate

Targets of locality probes are the true answers, as in the models' training.

Creatures are split. "test" edits creatures 140-199, for which no second-hop question was in the
training set. "train" (for editors that are trained) edits creatures 0-139. `subjects="new"` gives
an unlimited number of creatures that are in no model's training set: even numbers from 200 for
"test", odd ones for "train".
"""

import itertools
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import msgspec
from PIL.Image import Image
from tokenizers import Tokenizer

from errata.adapters.zoo.assets import TOKENIZER
from errata.bench.data.world import drawing
from errata.bench.data.world.drawing import digit_indices
from errata.bench.data.world.world import (
    ATTRIBUTES,
    DIGITS,
    FACTS,
    HOPS,
    NUM_HELD_OUT,
    NUM_TRAINED,
    PHOTOS,
    TEXT_RELATIONS,
    Appearance,
    Creature,
    World,
    load_facts,
    num_differences,
)
from errata.functional.errors import InvalidSettingsError, join_messages
from errata.functional.queries import Case, Query

__all__ = ["RELATIONS", "SPLITS", "RenderedImage", "cases"]

Split = Literal["train", "test"]
Subjects = Literal["known", "new"]
RELATIONS = ("name", "home", "food", "keeper")
SPLITS = ("train", "test")
MAX_TARGET_TOKENS = 4


class RenderedImage(msgspec.Struct, frozen=True):
    """An image of the micro world that is drawn when it is loaded.

    Attributes:
        kind: What is drawn.
        subject: An appearance ("round-red-plain-blue-long"), the number of a digit or the label of
            a photograph. Empty for a scene.
        rendering: Key of the random pose, background and light.

    Example:
        >>> RenderedImage("scene", "", "7").load().size
        (64, 64)
    """

    kind: Literal["creature", "scene", "digit", "photo"]
    subject: str
    rendering: str

    @property
    def content_id(self) -> str:
        """An id of the content. Equal ids draw equal pixels."""
        return f"zoo/{self.kind}/{self.subject}/{self.rendering}"

    def load(self) -> Image:
        """Draw the image.

        Returns:
            An RGB image [64 64].
        """
        return _RENDERERS[self.kind](self.subject, self.rendering)


_RENDERERS: dict[str, Callable[[str, str], Image]] = {
    "creature": lambda subject, rendering: drawing.creature(
        Appearance(*subject.split("-")), rendering
    ),
    "scene": lambda _, rendering: drawing.scene(rendering).image,
    "digit": lambda subject, rendering: drawing.digit(int(subject), rendering),
    "photo": drawing.photo,
}


def cases(
    num_cases: int,
    seed: int = 0,
    *,
    split: Split = "test",
    subjects: Subjects = "known",
    relations: Sequence[str] = RELATIONS,
) -> list[Case]:
    """Make the first cases of a split. Equal arguments give equal cases.

    No two cases edit the same fact until all facts of the split were edited once (`known` x 4
    relations: 240 in "test", 560 in "train"). After that the facts repeat with other targets.

    Args:
        num_cases: The number of cases.
        seed: Seed of the order of the facts, the targets and the questions.
        split: "test", or "train" for editors that are trained.
        subjects: "known" for creatures of the models' training set, "new" for others.
        relations: The relations to edit.

    Returns:
        The cases.

    Raises:
        InvalidSettingsError: If the split, the kind of subjects or a relation is unknown, or
            `num_cases` is negative.

    Example:
        >>> case = cases(1)[0]
        >>> sorted(case.probes)[0], case == cases(1)[0]
        ('hard_locality', True)
    """
    _validate(num_cases, split, subjects, relations)
    world = World()
    made_cases: list[Case] = []
    for turn in itertools.count():
        facts = _fact_order(turn, seed, split, subjects, relations)[: num_cases - len(made_cases)]
        if not facts:
            return made_cases
        made_cases += [_make_case(world, world.creature(i), r, f"{seed}-{turn}") for i, r in facts]
    raise AssertionError("turns never end")


def _validate(num_cases: int, split: str, subjects: str, relations: Sequence[str]) -> None:
    errors = []
    if num_cases < 0:
        errors.append(f"num_cases must be 0 or more, got {num_cases}")
    if split not in SPLITS:
        errors.append(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if subjects not in ("known", "new"):
        errors.append(f"subjects must be known or new, got {subjects!r}")
    unknown = [r for r in relations if r not in FACTS]
    if unknown or not relations:
        errors.append(f"relations must be some of {', '.join(FACTS)}, got {list(relations)}")
    if errors:
        raise InvalidSettingsError(f"cases of the micro world: {join_messages(errors)}.")


def _fact_order(
    turn: int, seed: int, split: str, subjects: str, relations: Sequence[str]
) -> list[tuple[int, str]]:
    """List every (creature, relation) of a split once, in the order of this turn."""
    if subjects == "known":
        first_held = NUM_TRAINED - NUM_HELD_OUT
        indices = range(first_held) if split == "train" else range(first_held, NUM_TRAINED)
    else:
        start = NUM_TRAINED + (split == "train") + 2 * 100 * turn
        indices = range(start, start + 2 * 100, 2)
    facts = [(index, relation) for index in indices for relation in relations]
    random.Random(f"cases-{seed}-{split}-{subjects}-{turn}").shuffle(facts)
    return facts


def _make_case(world: World, creature: Creature, relation: str, draw_key: str) -> Case:
    name = f"{creature.index}-{relation}-{draw_key}"
    rng = random.Random(f"case-{name}")
    target = _choose_target(world, creature, relation, rng)
    image = _render_creature(creature, f"case-{name}")
    question = rng.choice(world.questions(relation))
    probes = {
        "rephrase": _image_queries(rng.sample(world.questions(relation, "held"), 3), target, image),
        "image_rephrase": tuple(
            Query(question, target, (_render_creature(creature, f"case-{name}-{i}"),))
            for i in range(3)
        ),
        "text_locality": _text_locality(world, creature, relation, target, rng),
        "same_entity_locality": _same_entity_locality(world, creature, relation, image, rng),
        "hard_locality": _hard_locality(world, creature, relation, name, rng),
        "image_locality": _image_locality(rng, name),
    }
    hop = {first: second for second, first in HOPS.items()}.get(relation)
    if hop:
        hop_questions = rng.sample(world.questions(hop), 2)
        probes["portability"] = _image_queries(hop_questions, world.second_hop(hop, target), image)
    return Case(name, Query(question, target, (image,)), probes)


def _render_creature(creature: Creature, rendering: str) -> RenderedImage:
    return RenderedImage("creature", "-".join(creature.appearance), rendering)


def _image_queries(
    questions: Sequence[str], target: str, image: RenderedImage
) -> tuple[Query, ...]:
    return tuple(Query(question, target, (image,)) for question in questions)


@cache
def _values_by_length(values: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """Group values by their number of tokens. Values of more than four tokens are left out."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    found: dict[int, list[str]] = {}
    for value in values:
        found.setdefault(len(tokenizer.encode(value).ids), []).append(value)
    return {n: tuple(found[n]) for n in sorted(found) if n <= MAX_TARGET_TOKENS}


def _choose_target(world: World, creature: Creature, relation: str, rng: random.Random) -> str:
    """Choose a value that differs from the true one, also in its second hop if there is one."""
    true = getattr(creature, relation)
    hop = {first: second for second, first in HOPS.items()}.get(relation)
    while True:
        by_length = _values_by_length(world.possible_answers(relation))
        value = rng.choice(by_length[rng.choice(list(by_length))])
        if value == true or (hop and world.second_hop(hop, value) == world.second_hop(hop, true)):
            continue
        return value


def _text_locality(
    world: World, creature: Creature, relation: str, target: str, rng: random.Random
) -> tuple[Query, ...]:
    known = creature if creature.index < NUM_TRAINED else rng.choice(world.trained)
    others = [c for c in world.trained if c not in (creature, known) and c.name != target]
    asked = rng.choice([r for r in TEXT_RELATIONS if r != relation])
    queries = [_named_query(world, known, asked, rng)]
    same = relation if relation in TEXT_RELATIONS else rng.choice(TEXT_RELATIONS)
    queries.append(_named_query(world, rng.choice(others), same, rng))
    hop = {first: second for second, first in HOPS.items()}.get(relation)
    if hop:
        form = rng.choice(load_facts()["text_questions"][hop])
        queries.append(Query(form.format(s=target), world.second_hop(hop, target)))
    else:
        queries.append(_named_query(world, rng.choice(others), rng.choice(TEXT_RELATIONS), rng))
    kind = rng.choice(sorted(load_facts()["knowledge"]))
    subject = rng.choice(sorted(load_facts()["knowledge"][kind]))
    form = rng.choice(load_facts()["text_questions"][kind])
    queries.append(Query(form.format(s=subject), load_facts()["knowledge"][kind][subject]))
    return tuple(queries)


def _named_query(world: World, creature: Creature, relation: str, rng: random.Random) -> Query:
    question = rng.choice(world.named_questions(relation, creature.name))
    return Query(question, getattr(creature, relation))


def _same_entity_locality(
    world: World, creature: Creature, relation: str, image: RenderedImage, rng: random.Random
) -> tuple[Query, ...]:
    """Make queries of three other facts and an attribute, or four attributes for a new creature."""
    facts = [r for r in FACTS if r != relation]
    known = creature.index < NUM_TRAINED
    asked = rng.sample(facts, 3) if known else []
    asked += rng.sample(ATTRIBUTES, 4 - len(asked))
    return tuple(
        Query(rng.choice(world.questions(r)), world.answer(creature, r), (image,)) for r in asked
    )


def _hard_locality(
    world: World, creature: Creature, relation: str, name: str, rng: random.Random
) -> tuple[Query, ...]:
    """Make queries of the edited relation on the two most similar creatures and two others."""
    others = [c for c in world.trained if c.index != creature.index]
    alike = sorted(
        others, key=lambda c: (num_differences(c.appearance, creature.appearance), c.index)
    )
    chosen = alike[:2] + rng.sample(alike[2:], 2)
    return tuple(
        Query(
            rng.choice(world.questions(relation)),
            getattr(other, relation),
            (_render_creature(other, f"case-{name}-other"),),
        )
        for other in chosen
    )


def _image_locality(rng: random.Random, name: str) -> tuple[Query, ...]:
    forms = load_facts()["picture_questions"]
    index = rng.choice(digit_indices("test"))
    value = drawing.digits()[1][index]
    label = rng.choice(PHOTOS)
    scene = RenderedImage("scene", "", f"case-{rng.randrange(100_000)}")
    drawn = drawing.scene(scene.rendering)
    head = rng.choice(("count", "scene_color", "scene_shape"))
    return (
        Query(
            rng.choice(forms["digit"]),
            DIGITS[value],
            (RenderedImage("digit", str(index), f"case-{name}"),),
        ),
        Query(rng.choice(forms[head]), getattr(drawn, head), (scene,)),
        Query(rng.choice(forms["photo"]), label, (RenderedImage("photo", label, f"case-{name}"),)),
    )
