"""IKE's deltas as values: side by side, merged, taken apart, saved."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
import torch

from errata import adapters
from errata.adapters.inputs.images import open_image
from errata.editors.ike import IkeConfig, ike_editor
from errata.functional import Case, Query, bind, bind_rows
from errata.functional.deltas import serialization
from errata.functional.deltas.merging import merge, remove, scale, select
from errata.functional.deltas.stacking import stack, unstack
from errata.functional.errors import InvalidInputError
from errata.functional.kinds.prompt.apply import expand_prompts
from tests.editors.queries import edited, make_image, put

PLAIN = IkeConfig(
    fact_template="{statement}. ", question_template="{question}", encoder="hashed:128"
)
SCOPED = msgspec.structs.replace(PLAIN, min_similarity=0.5, min_image_similarity=0.5)


@pytest.fixture(scope="module")
def tiny():
    return adapters.from_module(*adapters.tiny_model("llava"))


CORPUS = [
    Case(str(n), Query(f"what does the {beast} eat?", food, (make_image(90 + n),)), {})
    for n, (beast, food) in enumerate([("owl", "moth"), ("crab", "squid"), ("fox", "plum")])
]


def test_side_by_side_each_row_reads_under_its_own_memory(tiny):
    edits = [Query("who is it?", name, (make_image(n),)) for n, name in enumerate(["bo", "kim"])]
    editor = ike_editor(PLAIN)
    state = editor.init(tiny, torch.Generator())
    together = editor.edit_each(tiny, state, edits)
    assert put(tiny, together, *["who is it?"] * 3, edit=torch.tensor([1, -1, 0])) == [
        "who is it? kim. who is it?",
        "who is it?",
        "who is it? bo. who is it?",
    ]
    alone = [edited(tiny, PLAIN, edit) for edit in edits]
    again = stack(alone)
    assert again.header == together.header
    for one, two in zip(unstack(together), alone):
        assert one.header == two.header
    mixed = bind_rows(tiny, alone, [1, -1, 0])
    queries = [edits[0]] * 3
    got = mixed.preprocess(queries).input_ids
    want = bind(tiny, together).preprocess(queries, edit_index=torch.tensor([1, -1, 0])).input_ids
    assert torch.equal(got, want)


def test_side_by_side_from_a_memory_that_holds_something(tiny):
    editor = ike_editor(SCOPED)
    state = editor.init(tiny, torch.Generator())
    _, state = editor.edit(tiny, state, [Query("where does bo live?", "rome")])
    later = [Query("what does kim eat?", "plum"), Query("who keeps kim?", "ann")]
    together = editor.edit_each(tiny, state, later)
    asked_for = ["where does bo live?", "what does kim eat?", "what does kim eat?"]
    assert put(tiny, together, *asked_for, edit=torch.tensor([1, 0, 1]))[:2] == [
        "where does bo live? rome. where does bo live?",
        "what does kim eat? plum. what does kim eat?",
    ]
    (first, _) = unstack(together)
    assert put(tiny, first, "where does bo live?") == [
        "where does bo live? rome. where does bo live?"
    ]


def test_memories_merge_and_edits_are_taken_out_by_id(tiny):
    one = edited(tiny, SCOPED, Query("where does bo live?", "rome"))
    two = edited(tiny, SCOPED, Query("what does kim eat?", "plum"))
    both = merge(one, two)
    in_turn = edited(
        tiny, SCOPED, Query("where does bo live?", "rome"), Query("what does kim eat?", "plum")
    )
    assert both.header == in_turn.header
    assert all(torch.equal(both.tensors[n], in_turn.tensors[n]) for n in in_turn.tensors)
    left = remove(both, [one.header.edits[0].id])
    assert left.header == two.header
    assert put(tiny, left, "where does bo live?") == ["where does bo live?"]
    with pytest.raises(InvalidInputError, match="differ in encoder; key_size"):
        merge(one, edited(tiny, IkeConfig(encoder="base"), Query("who?", "bo")))
    with pytest.raises(Exception, match="cannot be said by half"):
        scale(one, 0.5)


def test_pictures_of_facts_survive_merging_and_taking_apart(tiny):
    config = msgspec.structs.replace(PLAIN, include_images=True)
    one = edited(tiny, config, Query("who is it?", "bo", (make_image(1), make_image(2))))
    two = edited(tiny, config, Query("where is it?", "rome"))
    three = edited(tiny, config, Query("what is it?", "owl", (make_image(3),)))
    whole = merge(one, two, three)
    assert whole.header.entries[0].num_images == 2
    (read,) = expand_prompts(bind(tiny, select(whole, [2])), [Query("what is it?")])
    assert read.prompt == "<image>what is it? owl. what is it?"
    assert open_image(read.images[0]).tobytes() == make_image(3).tobytes()
    assert select(whole, [2]).header.entries == three.header.entries
    assert select(whole, [1]).header.entries[0].num_images == 0


def test_a_saved_delta_works_in_a_process_without_the_editor(tiny, tmp_path):
    edit = Query("who is it?", "bo", (make_image(1),))
    config = msgspec.structs.replace(
        SCOPED, num_demonstrations=2, include_images=True, encoder="base"
    )
    delta = edited(tiny, config, edit, cases=CORPUS)
    serialization.save_delta(tmp_path / "edit.safetensors", delta)
    make_image(1).save(tmp_path / "seen.png")
    script = f"""
import sys
from errata import adapters
from errata.functional import Query, bind, load_delta
model = adapters.from_module(*adapters.tiny_model("llava"))
bound = bind(model, load_delta(r"{tmp_path / "edit.safetensors"}"))
ids = bound.preprocess([Query("who is it?", "bo", (r"{tmp_path / "seen.png"}",))]).input_ids
assert not any(name.startswith("errata.editors") for name in sys.modules)
print(ids.tolist())
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(bind(tiny, delta).preprocess([edit]).input_ids.tolist())


def test_a_delta_tells_no_paths(tiny, tmp_path):
    config = msgspec.structs.replace(PLAIN, demonstration_source=str(tmp_path / "train.json"))
    delta = edited(tiny, config, Query("who?", "bo"))
    assert delta.header.settings["demonstration_source"] == "train.json"
    serialization.save_delta(tmp_path / "edit.safetensors", delta)
