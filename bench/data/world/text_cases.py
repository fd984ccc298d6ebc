"""Cases of the micro world whose edits have no image: a fact about a creature, changed by its name.

    reliability, rephrase   the edited question, and other wordings of it
    image_rephrase          further wordings, for trainings that need this probe
    text_locality           as in every case of the world: other names, other facts, knowledge
    same_entity_locality    the same name, other relations
    hard_locality           the same relation of other names
    image_locality          questions about images, one of them about this creature

Creatures are split as in `world.cases`.
"""

import random

from errata.bench.data.world.cases import (
    Split,
    _choose_target,
    _image_locality,
    _render_creature,
    _text_locality,
)
from errata.bench.data.world.world import NUM_HELD_OUT, NUM_TRAINED, TEXT_RELATIONS, Creature, World
from errata.functional.queries import Case, Query

__all__ = ["text_cases"]


def text_cases(num_cases: int, seed: int = 0, *, split: Split = "test") -> list[Case]:
    """Make the first cases of a split whose edits have no image. Equal arguments give equal cases.

    Args:
        num_cases: The number of cases.
        seed: Seed of the order of the facts, the targets and the questions.
        split: "test", or "train" for editors that are trained.

    Returns:
        The cases.

    Example:
        >>> [query.images for query in text_cases(1)[0].probes["rephrase"]]
        [(), ()]
    """
    world = World()
    first_held = NUM_TRAINED - NUM_HELD_OUT
    indices = range(first_held) if split == "train" else range(first_held, NUM_TRAINED)
    facts = [(index, relation) for index in indices for relation in TEXT_RELATIONS]
    made: list[Case] = []
    turn = 0
    while len(made) < num_cases:
        order = random.Random(f"text-{seed}-{split}-{turn}").sample(facts, len(facts))
        round_facts = order[: num_cases - len(made)]
        made += [_make_case(world, world.creature(i), r, f"{seed}-{turn}") for i, r in round_facts]
        turn += 1
    return made


def _make_case(world: World, creature: Creature, relation: str, draw_key: str) -> Case:
    name = f"text-{creature.index}-{relation}-{draw_key}"
    rng = random.Random(f"case-{name}")
    target = _choose_target(world, creature, relation, rng)
    forms = world.named_questions(relation, creature.name)
    edit_prompt, *others = rng.sample(forms, len(forms))
    half = max(1, len(others) // 2)
    image = _render_creature(creature, f"case-{name}")

    def named_query(creature: Creature, relation: str) -> Query:
        return Query(
            rng.choice(world.named_questions(relation, creature.name)), getattr(creature, relation)
        )

    rest = [r for r in TEXT_RELATIONS if r != relation]
    other_creatures = rng.sample([c for c in world.trained if c.index != creature.index], 3)
    image_query = Query(
        rng.choice(world.questions(relation)), getattr(creature, relation), (image,)
    )
    probes = {
        "rephrase": tuple(Query(form, target) for form in others[:half]),
        "image_rephrase": tuple(Query(form, target) for form in others[half:] or others),
        "text_locality": _text_locality(world, creature, relation, target, rng),
        "same_entity_locality": tuple(named_query(creature, r) for r in rest),
        "hard_locality": tuple(named_query(other, relation) for other in other_creatures),
        "image_locality": (*_image_locality(rng, name), image_query),
    }
    return Case(name, Query(edit_prompt, target), probes)
