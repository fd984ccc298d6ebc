"""IKE: what is found for a question, what stands before it, what that does to trained models."""

from __future__ import annotations

import msgspec
import pytest
import torch

from errata import adapters
from errata.adapters.inputs.images import open_image
from errata.bench.data.world import cases as world
from errata.editors import configure, make_editor
from errata.editors.ike import IkeConfig, ike_editor
from errata.editors.ike.config import PRESETS
from errata.functional import Case, Query, bind, generate
from errata.functional.deltas import serialization
from errata.functional.deltas.merging import remove
from errata.functional.errors import InvalidInputError, InvalidSettingsError
from errata.functional.kinds.prompt.apply import RetrievalPreprocess, expand_prompts
from errata.functional.kinds.schema import Prompt
from tests.editors.queries import edited, make_image, put

PLAIN = IkeConfig(
    fact_template="{statement}. ", question_template="{question}", encoder="hashed:128"
)
SCOPED = msgspec.structs.replace(PLAIN, min_similarity=0.5, min_image_similarity=0.5)


@pytest.fixture(scope="module")
def tiny():
    return adapters.from_module(*adapters.tiny_model("llava"))


@pytest.fixture(scope="module")
def micro():
    return adapters.load_micro("llava")


CORPUS = [
    Case(
        str(n),
        Query(f"what does the {beast} eat?", food, (make_image(90 + n),)),
        {
            "rephrase": (Query(f"which food does the {beast} like?", food, (make_image(90 + n),)),),
            "text_locality": (Query(f"who keeps the {beast}?", "ann"),),
        },
    )
    for n, (beast, food) in enumerate([("owl", "moth"), ("crab", "squid"), ("fox", "plum")])
]


# What is found.


def test_the_fact_that_fits_a_question_is_put_before_it(tiny):
    delta = edited(
        tiny, SCOPED, Query("where does bo live?", "rome"), Query("what does kim eat?", "plum")
    )
    assert put(
        tiny, delta, "where does bo live now?", "what did kim eat?", "how many shapes are there?"
    ) == [
        "where does bo live? rome. where does bo live now?",
        "what does kim eat? plum. what did kim eat?",
        "how many shapes are there?",
    ]


def test_of_the_same_question_about_two_pictures_the_right_ones_fact_is_found(tiny):
    one, two, other = make_image(1), make_image(2), make_image(3)
    delta = edited(
        tiny, PLAIN, Query("who is it?", "bo", (one,)), Query("who is it?", "kim", (two,))
    )
    assert put(tiny, delta, "who is it?", images=(one,)) == ["who is it? bo. who is it?"]
    assert put(tiny, delta, "who is it?", images=(two,)) == ["who is it? kim. who is it?"]
    scoped = edited(
        tiny,
        msgspec.structs.replace(SCOPED, min_image_similarity=0.98),
        Query("who is it?", "bo", (one,)),
    )
    assert put(tiny, scoped, "who is it?", images=(one,)) == ["who is it? bo. who is it?"]
    assert put(tiny, scoped, "who is it?", images=(other,)) == ["who is it?"]
    assert put(tiny, scoped, "who is it?") == ["who is it?"], "about a picture, asked without"


def test_a_fact_without_a_picture_is_found_for_questions_with_one(tiny):
    delta = edited(tiny, SCOPED, Query("where does bo live?", "rome"))
    assert put(tiny, delta, "where does bo live?", images=(make_image(1),)) == [
        "where does bo live? rome. where does bo live?"
    ]


def test_a_repeated_edit_counts_as_it_says_now(tiny):
    twice = [Query("where does bo live?", "rome"), Query("where does bo live?", "oslo")]
    delta = edited(tiny, PLAIN, *twice)
    assert put(tiny, delta, "where does bo live?") == [
        "where does bo live? oslo. where does bo live?"
    ]
    assert put(tiny, remove(delta, [1]), "where does bo live?") == [
        "where does bo live? rome. where does bo live?"
    ]


def test_memories_one_on_another_each_find_their_own_fact(tiny):
    """What the first puts before a question is no part of the second's keys."""
    config = msgspec.structs.replace(PLAIN, encoder="base", min_similarity=0.99)
    one = edited(tiny, config, Query("who is it?", "bo", (make_image(1),)))
    two = edited(tiny, config, Query("where does it live?", "rome", (make_image(2),)))
    both = bind(bind(tiny, one), two)
    own = [
        Query("who is it?", "", (make_image(1),)),
        Query("where does it live?", "", (make_image(2),)),
    ]
    for query, fact in zip(own, ("who is it? bo.", "live? rome.")):
        (whole,) = expand_prompts(both, [query])
        assert fact in whole.prompt
        assert whole.prompt.count(".") == 1
    found = [bound.preprocess.memory.retrieve(own, None) for bound in (both, bind(tiny, two))]
    assert found == [[(0, []), (0, [0])]] * 2
    again = edited(bind(tiny, one), config, Query("where does it live?", "rome", (make_image(2),)))
    for name, tensor in two.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor)


def test_several_facts_stand_with_the_best_next_to_the_question(tiny):
    config = msgspec.structs.replace(PLAIN, max_facts=2)
    facts = [
        Query("where does bo live?", "rome"),
        Query("where does kim live?", "oslo"),
        Query("what is the symbol of iron?", "fe"),
    ]
    assert put(tiny, edited(tiny, config, *facts), "where does kim live?") == [
        "where does bo live? rome. where does kim live? oslo. where does kim live?"
    ]


def test_words_in_braces_are_words(tiny):
    delta = edited(tiny, PLAIN, Query("what is {target} {question}?", "{prompt}"))
    assert put(tiny, delta, "what is {question}?") == [
        "what is {target} {question}? {prompt}. what is {question}?"
    ]


def test_the_target_of_a_question_takes_no_part(tiny):
    cases = CORPUS * 4
    config = msgspec.structs.replace(PLAIN, num_demonstrations=4, reserved_tokens=4)
    delta = edited(tiny, config, Query("who is it?", "bo"), cases=cases)
    bound = bind(tiny, delta)
    targets = ["bo", "kim", "a very long answer that goes on and on"]
    assert (
        len({expand_prompts(bound, [Query("who may it be?", t)])[0].prompt for t in targets}) == 1
    )
    bare = bound.preprocess([Query("who may it be?")])
    full = bound.preprocess([Query("who may it be?", "bo")])
    first = int(full.logit_positions[0, 0]) + 1
    assert torch.equal(bare.input_ids[0, :first], full.input_ids[0, :first])
    plain = tiny.preprocess([Query("who may it be?", "bo")])
    assert torch.equal(full.labels, plain.labels), "the scored tokens stay the target's"


# Demonstrations.


def test_demonstrations_copy_update_and_retain_stand_nearest_last(tiny):
    config = msgspec.structs.replace(
        PLAIN,
        num_demonstrations=3,
        demonstration_template="[{prompt} {target}|{question} {answer}] ",
    )
    edit = Query("what does the crab eat?", "moss")
    delta = edited(tiny, config, edit, cases=CORPUS)
    text = put(tiny, delta, "what food does the crab like?")[0]
    demos, _, rest = text.rpartition("] ")
    assert rest == "what does the crab eat? moss. what food does the crab like?"
    found = [demo.split("[")[1] for demo in demos.split("] ")]
    assert sorted(found) == sorted(
        [
            "what does the crab eat? squid|what does the crab eat? squid",
            "what does the crab eat? squid|which food does the crab like? squid",
            "what does the crab eat? squid|who keeps the crab? ann",
        ]
    )
    turned = msgspec.structs.replace(config, demonstration_order="nearest-first")
    other = put(tiny, edited(tiny, turned, edit, cases=CORPUS), "what food does the crab like?")[0]
    assert [demo.split("[")[1] for demo in other.rpartition("] ")[0].split("] ")] == found[::-1]


def test_shares_say_how_many_of_each_a_case_gives(tiny):
    config = msgspec.structs.replace(
        PLAIN, num_demonstrations=1, copy_update_retain=(1, 0, 1), num_source_cases=2
    )
    entry = edited(tiny, config, Query("who?", "bo"), cases=CORPUS).header.entries[0]
    assert entry.num_stored_demonstrations == 4


def test_demonstrations_go_until_the_prompt_fits_and_the_fact_stays(tiny):
    room = 8
    config = msgspec.structs.replace(
        PLAIN, num_demonstrations=100, reserved_tokens=room, copy_update_retain=(1, 3, 4)
    )
    edit = Query("where does bo live?", "rome")
    delta = edited(tiny, config, edit, cases=CORPUS * 12)
    short = bind(tiny._replace(card=msgspec.structs.replace(tiny.card, max_positions=200)), delta)
    whole = expand_prompts(bind(tiny, delta), [edit])[0].prompt
    cut = expand_prompts(short, [edit])[0].prompt
    assert whole.endswith(cut)
    assert len(cut) < len(whole)
    assert cut.endswith("where does bo live? rome. where does bo live?")
    tokens = short.preprocess([Query("where does bo live?")]).input_ids.shape[1]
    assert 200 - room - 60 < tokens <= 200 - room


def test_a_fact_that_does_not_fit_is_an_error_that_says_so(tiny):
    delta = edited(tiny, PLAIN, Query("how old is " + "very " * 20, "bo"))
    small = tiny._replace(card=msgspec.structs.replace(tiny.card, max_positions=60))
    bound = bind(small, delta)._replace(preprocess=_within(bind(small, delta).preprocess, 60))
    with pytest.raises(InvalidInputError, match="fits only without them"):
        bound.preprocess([Query("how old is it?", "bo")])
    with pytest.raises(InvalidInputError, match="must have at most"):  # nor without
        bound.preprocess([Query("how old is " + "very " * 60, "bo")])


def _within(read, context: int):
    """The same reading for a context that is smaller than the model's."""

    def inner(queries, **options):
        inputs = read.base_preprocess(queries, **options)
        if inputs.input_ids.shape[1] > context:
            raise InvalidInputError(f"a row must have at most {context} tokens.")
        return inputs

    return RetrievalPreprocess(read.memory, inner, context)


def test_settings_that_can_not_be_are_refused(tiny):
    with pytest.raises(InvalidSettingsError, match="there are none"):
        ike_editor(IkeConfig(num_demonstrations=2)).init(tiny, torch.Generator())
    with pytest.raises(
        InvalidSettingsError,
        match=r"ike.question_template must hold .*; ike.fact_template must hold",
    ):
        ike_editor(IkeConfig(question_template="who?", fact_template="New Fact: {prompt}"))
    with pytest.raises(InvalidSettingsError, match="must name a layer from 1 to"):
        edited(tiny, IkeConfig(encoder="base:99"), Query("who?", "bo"))
    with pytest.raises(InvalidInputError, match="must hold more than white space"):
        edited(tiny, PLAIN, Query("who?", " "))
    assert make_editor(configure("ike", "easyedit-k0", max_facts=2)).config.max_facts == 2


# Conventions of the peers.


def test_prompts_of_the_peers_word_for_word(tiny):
    edit, question = Query("who is it?", "bo"), "who is this?"
    said = {
        name: put(tiny, edited(tiny, PRESETS[name], edit), question)[0]
        for name in ("easyedit-k0", "easyedit-prompt", "ripple-ice")
    }
    k32 = msgspec.structs.replace(PRESETS["easyedit"], encoder="hashed", num_demonstrations=2)
    said["easyedit"] = put(tiny, edited(tiny, k32, edit, cases=CORPUS[:1]), question)[0]
    # ike_main.py:64-101 and multimodal_editor.py:451-457 (reference/easyedit.md 4.3)
    assert said["easyedit-k0"] == "New Fact: who is it? bo\nPrompt: who is it?\n\nwho is this?"
    own = (
        "New Fact: who is it? bo\nPrompt: who is it? bo\n\n"
        "New Fact: who is it? bo\nPrompt: who is this?"
    )
    head = said["easyedit"].removesuffix(own)
    assert said["easyedit"].endswith(own)
    assert head.count("New Fact: what does the owl eat? moth\nPrompt: ") == 2
    assert said["ripple-ice"] == "Imagine that who is it? bo.\nwho is this?"
    assert said["easyedit-prompt"].endswith(
        "answer the question:\nNew Fact:who is it? bo.\nPrompt:who is this?\n"
    )


# Several images.


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_facts_and_demonstrations_show_their_pictures(family, tmp_path):
    model = adapters.from_module(*adapters.tiny_model(family))
    config = msgspec.structs.replace(
        PLAIN, num_demonstrations=2, include_images=True, copy_update_retain=(1, 0, 0)
    )
    mine = make_image(1)
    delta = edited(model, config, Query("who is it?", "bo", (mine,)), cases=CORPUS)
    serialization.save_delta(tmp_path / "shown.safetensors", delta)
    delta = serialization.load_delta(tmp_path / "shown.safetensors")
    (read,) = expand_prompts(bind(model, delta), [Query("who is it?", "bo", (make_image(7),))])
    assert read.prompt.count("<image>") == 4 == len(read.images)
    assert open_image(read.images[2]).tobytes() == mine.tobytes()
    assert read.images[3] is not None
    inputs = bind(model, delta).preprocess([Query("who is it?", "bo", (make_image(7),))])
    plain = model.preprocess([Query("who is it?", "bo", (make_image(7),))])
    assert inputs.image_mask.sum() == 4 * plain.image_mask.sum()
    assert torch.equal(inputs.labels, plain.labels)
    # asked in words alone: the images of the fact, none of its own
    (words,) = expand_prompts(bind(model, delta), [Query("who is it?")])
    assert words.prompt.count("<image>") == 3 == len(words.images)


def test_a_backbone_of_one_picture_is_shown_none_but_its_own(tiny):
    config = msgspec.structs.replace(PLAIN, include_images=True)
    delta = edited(tiny, config, Query("who is it?", "bo", (make_image(1),)))
    single = tiny._replace(card=msgspec.structs.replace(tiny.card, takes_several_images=False))
    (read,) = expand_prompts(bind(single, delta), [Query("who is it?", "bo", (make_image(7),))])
    assert read.prompt == "who is it? bo. who is it?"
    assert len(read.images) == 1


# Other models.


def test_text_decoders_are_edited_too():
    model = adapters.from_module(*adapters.tiny_model("gpt2"))
    delta = edited(model, msgspec.structs.replace(PLAIN, encoder="base"), Query("who?", "bo"))
    assert put(model, delta, "who is it?") == ["who? bo. who is it?"]
    assert isinstance(delta.header.entries[0], Prompt)
    assert delta.header.entries[0].image_key_size == 0


# Trained models.


@pytest.mark.parametrize("name", ["llava", "blip2", "qwen2_vl"])
def test_micro_models_say_new_facts_and_keep_the_rest(name):
    model = adapters.load_micro(name)
    cases = world.cases(8, 3, relations=("home", "food", "keeper"))
    delta = edited(model, PRESETS["micro"], *(case.edit for case in cases))
    bound = bind(model, delta)
    wanted = [q for case in cases for q in (case.edit, case.probes["rephrase"][0])]
    said = generate(bound, wanted, 8)
    right = [text.strip() == query.target for text, query in zip(said, wanted)]
    assert sum(right) >= 0.85 * len(right), list(zip(said, [q.target for q in wanted]))
    kept = [
        q
        for case in cases
        for q in (case.probes["text_locality"][0], case.probes["image_locality"][0])
    ]
    assert [query.prompt for query in expand_prompts(bound, kept)] == [
        query.prompt for query in kept
    ]


def test_fifty_edits_in_sequence_are_all_found(micro):
    cases = world.cases(50, 1, subjects="new")
    editor = ike_editor(PRESETS["micro"])
    delta, _ = editor.edit(
        micro, editor.init(micro, torch.Generator()), [case.edit for case in cases]
    )
    bound = bind(micro, delta)
    own = expand_prompts(bound, [case.edit for case in cases])
    facts = delta.header.entries[0].facts
    assert [query.prompt for query in own] == [
        fact + case.edit.prompt for fact, case in zip(facts, cases)
    ]
    others = expand_prompts(bound, [case.probes["image_rephrase"][0] for case in cases])
    right = sum(q.prompt == f + c.edit.prompt for q, f, c in zip(others, facts, cases))
    assert right >= 40
