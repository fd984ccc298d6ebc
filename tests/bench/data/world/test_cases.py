"""The editing benchmark of the micro world: deterministic, split, and true."""

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from errata.adapters.zoo.assets import TOKENIZER
from errata.bench.data.world.cases import RELATIONS, RenderedImage, cases
from errata.bench.data.world.world import HOPS, NUM_HELD_OUT, NUM_TRAINED, World
from errata.functional.errors import InvalidSettingsError


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def some() -> list:
    return cases(240)


def parts(case) -> tuple[int, str]:
    index, relation, *_ = case.id.split("-")
    return int(index), relation


def test_cases_follow_from_the_seed(some):
    assert cases(240)[:20] == some[:20] == cases(20)
    assert [c.id for c in cases(20, seed=1)] != [c.id for c in some[:20]]


def test_a_thousand_cases_are_a_thousand_different_edits():
    many = cases(1000)
    assert len({c.id for c in many}) == 1000
    assert len({c.edit.images[0].content_id for c in many}) == 1000


def test_the_first_round_edits_every_fact_once(some):
    assert len({parts(case) for case in some}) == 60 * len(RELATIONS) == len(some)


def test_splits_share_no_creature(world):
    first_held = NUM_TRAINED - NUM_HELD_OUT
    assert all(parts(c)[0] >= first_held for c in cases(300, split="test"))
    assert all(parts(c)[0] < first_held for c in cases(300, split="train"))
    new = {
        split: {parts(c)[0] for c in cases(500, split=split, subjects="new")}
        for split in ("train", "test")
    }
    assert not new["train"] & new["test"]
    assert min(new["train"] | new["test"]) >= NUM_TRAINED


def test_targets_are_one_to_four_tokens_and_not_the_truth(some, world):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    lengths = [len(tokenizer.encode(case.edit.target).ids) for case in some]
    assert set(lengths) == {1, 2, 3, 4}
    assert min(lengths.count(n) for n in (1, 2, 3, 4)) >= 0.1 * len(some)
    for case in some:
        index, relation = parts(case)
        assert case.edit.target != getattr(world.creature(index), relation)
        assert case.edit.target in world.possible_answers(relation)


def test_rephrases_keep_the_picture_and_renderings_keep_the_question(some, world):
    for case in some[:40]:
        _, relation = parts(case)
        for query in case.probes["rephrase"]:
            assert query.images == case.edit.images
            assert query.prompt in world.questions(relation, "held")
            assert query.target == case.edit.target
        for query in case.probes["image_rephrase"]:
            assert query.prompt == case.edit.prompt
            assert query.images[0].subject == case.edit.images[0].subject
            assert query.images[0].content_id != case.edit.images[0].content_id


def test_portability_is_the_second_hop_of_the_new_value(some, world):
    for case in some:
        index, relation = parts(case)
        hop = {first: second for second, first in HOPS.items()}.get(relation)
        assert ("portability" in case.probes) == (hop is not None)
        for query in case.probes.get("portability", ()):
            assert query.target == world.second_hop(hop, case.edit.target)
            assert query.target != world.answer(world.creature(index), hop)


def test_locality_probes_leave_the_edited_fact_alone(some, world):
    everything = {q: f for f in world.text_facts() for q in f.questions}
    for case in some:
        index, relation = parts(case)
        creature = world.creature(index)
        for query in case.probes["text_locality"]:
            fact = everything[query.prompt]
            assert not query.images
            assert query.target == fact.answer
            assert (fact.subject, fact.kind) != (creature.name, f"named_{relation}")
        for query in case.probes["same_entity_locality"]:
            assert query.images == case.edit.images
            assert query.prompt not in world.questions(relation)
        for query in case.probes["hard_locality"]:
            assert query.images[0].subject != case.edit.images[0].subject
            assert query.prompt in world.questions(relation)


def test_every_probe_is_there_and_answered(some):
    for case in some:
        assert {
            "rephrase",
            "image_rephrase",
            "text_locality",
            "same_entity_locality",
            "hard_locality",
            "image_locality",
        } <= set(case.probes)
        assert all(q.prompt and q.target for queries in case.probes.values() for q in queries)


def test_new_creatures_are_asked_only_what_is_true(world):
    for case in cases(20, subjects="new"):
        index, _ = parts(case)
        assert index >= NUM_TRAINED
        for query in case.probes["same_entity_locality"]:
            assert query.target in world.creature(index).appearance


def test_drawings_are_values_and_draw_the_same_again():
    drawing = cases(1)[0].edit.images[0]
    copy = msgspec.json.decode(msgspec.json.encode(drawing), type=RenderedImage)
    assert copy == drawing
    assert copy.content_id == drawing.content_id
    assert np.array_equal(np.asarray(copy.load()), np.asarray(drawing.load()))


def test_bad_settings_are_refused_all_at_once():
    with pytest.raises(InvalidSettingsError) as refused:
        cases(-1, split="dev", relations=("home", "weight"))  # type: ignore[arg-type]
    for part in (
        "num_cases must be 0 or more",
        "split must be one of",
        "relations must be some of",
    ):
        assert part in str(refused.value)
