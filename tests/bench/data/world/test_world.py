"""The micro world: one answer per question, names without end, splits that do not leak."""

import hashlib

import pytest

from errata.bench.data.world.world import (
    ATTRIBUTES,
    FACTS,
    HOPS,
    NUM_TRAINED,
    World,
    has_clear_colors,
    load_facts,
    name_of,
    num_differences,
)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def values(tree) -> object:
    """The values of records, dicts and sequences as nested lists, without names of fields."""
    if isinstance(tree, dict):
        return [[values(key), values(value)] for key, value in tree.items()]
    if hasattr(tree, "__struct_fields__"):
        return [values(getattr(tree, field)) for field in tree.__struct_fields__]
    return [values(item) for item in tree] if isinstance(tree, tuple | list) else tree


def test_a_world_follows_from_its_seed(world):
    assert World().trained == world.trained
    assert World().creature(4321) == world.creature(4321)
    assert World(1).trained != world.trained


def test_the_world_is_the_one_the_shipped_models_were_trained_on(world):
    facts = repr(values((world.trained, world.land, world.job)))
    assert hashlib.sha256(facts.encode()).hexdigest().startswith("dee7229f371a4175")


def test_names_never_repeat():
    names = [name_of(index) for index in range(20_000)]
    assert len(set(names)) == len(names)


def test_trained_looks_can_be_told_apart(world):
    looks = [creature.appearance for creature in world.trained]
    assert len(looks) == NUM_TRAINED
    assert all(has_clear_colors(look) for look in looks)
    assert min(num_differences(a, b) for i, a in enumerate(looks) for b in looks[:i]) >= 2


def test_new_creatures_look_like_no_trained_one(world):
    for index in range(NUM_TRAINED, NUM_TRAINED + 50):
        new = world.creature(index)
        assert new.index == index
        assert min(num_differences(new.appearance, old.appearance) for old in world.trained) >= 2


def test_every_city_has_a_land_and_every_keeper_a_job(world):
    assert set(world.land.values()) == set(load_facts()["lands"])
    assert set(world.job.values()) == set(load_facts()["jobs"])
    assert set(world.land) == set(world.cities)
    assert set(world.job) == set(world.keepers)
    for relation, bridge in HOPS.items():
        for creature in world.trained[:20]:
            bridged = world.second_hop(relation, getattr(creature, bridge))
            assert world.answer(creature, relation) == bridged
    falmont = world.cities[9]
    assert world.second_hop("chain", falmont) == f"{falmont} , {world.land[falmont]}"


def test_held_out_questions_are_new_but_made_of_seen_parts(world):
    for relation in (*FACTS, *ATTRIBUTES, *HOPS):
        train, held = (set(world.questions(relation, split)) for split in ("train", "held"))
        assert held
        assert train
        assert not train & held
        forms, subjects = load_facts()["questions"][relation], load_facts()["subjects"]
        assert all(any(f.format(s=s) in train for s in subjects) for f in forms)
        assert all(any(f.format(s=s) in train for f in forms) for s in subjects)


def test_no_two_facts_answer_one_text_question_differently(world):
    answers: dict[str, str] = {}
    for fact in world.text_facts():
        for question in fact.questions:
            assert answers.setdefault(question, fact.answer) == fact.answer, question


def test_no_two_relations_share_a_picture_question(world):
    asked: dict[str, str] = {}
    for relation in load_facts()["questions"]:
        for split in ("train", "held"):
            for question in set(world.questions(relation, split)):
                assert asked.setdefault(question, relation) == relation, question


def test_answers_are_among_the_values(world):
    for creature in world.trained[:50]:
        for relation in (*FACTS, *ATTRIBUTES):
            assert world.answer(creature, relation) in world.possible_answers(relation)
