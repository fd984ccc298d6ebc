"""What holds for every editor: its queries, its training, its numbers, what edits it keeps."""

from __future__ import annotations

import functools
import json

import msgspec
import pytest
import torch
from PIL import Image

from errata.adapters import from_module, tiny_model
from errata.bench.cli.main import main
from errata.editors import configure, make_editor
from errata.functional import Query, bind, generate, merge, remove
from errata.functional.deltas.serialization import load_delta, save_delta
from errata.functional.deltas.stacking import select_edits, unstack
from errata.functional.errors import EditDivergedError, InvalidInputError, InvalidSettingsError
from tests.editors.methods import CASES

IMAGE = Image.new("RGB", (40, 32), (200, 30, 60))
ASKED = [Query("who is it?", "bo", (IMAGE,)), Query("where does it live?", "rome", (IMAGE,))]
BAD = {
    "none": ([], "at least one query, got none"),
    "no list": (7, "must be a list of Query"),
    "text": ("who?", "must be a list of Query"),
    "no query": ([("who?", "bo")], "query 1: it must be a Query"),
    "no target": ([ASKED[0], Query("who?", "")], "query 2: the target must hold more than"),
    "blank target": ([Query("who?", " \t")], "query 1: the target must hold more than"),
    "no text": ([Query(3, "bo")], "query 1: prompt and target must be text"),
    "surrogate": ([Query("who \ud800?", "bo")], "lone surrogate U\\+D800"),
    "surrogate target": ([Query("who?", "b\udfffo")], "lone surrogate U\\+DFFF"),
}


@functools.cache
def model():
    return from_module(*tiny_model("llava"))


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("name", list(CASES))
def test_every_editor_refuses_the_same_queries_in_the_same_words(name, bad):
    editor = make_editor(CASES[name])
    queries, message = BAD[bad]
    state = editor.init(model(), seeded())
    for make in (editor.edit, editor.edit_each):
        with pytest.raises(InvalidInputError, match=message):
            make(model(), state, queries)


def test_one_image_is_taken_as_a_tuple_of_one():
    assert Query("who?", "bo", IMAGE) == Query("who?", "bo", (IMAGE,))
    assert Query("who?", images=["a.png"]).images == Query("who?", images="a.png").images
    assert Query("who?", aliases="bob").aliases == ("bob",)
    assert Query("who?")._replace(target="bo") == Query("who?", "bo")


@pytest.mark.parametrize("name", ["mend", "serac", "liveedit"])
def test_an_untrained_editor_refuses_to_edit(name):
    editor = make_editor(msgspec.structs.replace(CASES[name], untrained=False))
    state = editor.init(model(), seeded())
    for make in (editor.edit, editor.edit_each):
        with pytest.raises(InvalidSettingsError, match="must be trained before it edits"):
            make(model(), state, ASKED)


# ------------------------------------------------------------------ edits that diverge


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("finetune", {"lr": 1e38, "num_steps": 3, "norm_constraint": None}),
        ("lora", {"lr": 1e38, "num_steps": 3}),
        ("grace", {"lr": 1e38, "num_steps": 3}),
        ("wise", {"lr": 1e38, "num_steps": 3, "norm_constraint": None}),
    ],
)
def test_a_diverged_edit_is_an_error_not_a_delta(kind, settings):
    editor = make_editor(configure(kind, **settings))
    state = editor.init(model(), seeded())
    for make in (editor.edit, editor.edit_each):
        with pytest.raises(EditDivergedError, match=f"{kind} diverged on query 1") as caught:
            make(model(), state, ASKED)
        assert caught.value.edits


def test_only_the_edit_that_diverged_is_named():
    """A base whose own logits are NaN for one image: its edit fails, the other is fine."""
    broken = model()
    embed = broken.embed

    def poisoned(params, inputs, *rest, **more):
        batch = embed(params, inputs, *rest, **more)
        states = batch.hidden_states.clone()
        states[1] = torch.nan
        return batch._replace(hidden_states=states)

    editor = make_editor(configure("finetune", num_steps=2))
    state = editor.init(broken, seeded())
    with pytest.raises(EditDivergedError) as caught:
        editor.edit_each(broken._replace(embed=poisoned), state, ASKED)
    assert caught.value.edits == (1,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("kind", ["finetune", "lora", "grace", "wise"])
def test_settings_must_be_finite(kind, value):
    with pytest.raises(InvalidSettingsError, match="lr"):
        make_editor(configure(kind, lr=value))


# ------------------------------------------------------------------ default dtype, autocast


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", list(CASES))
def test_the_default_dtype_changes_nothing(name, dtype):
    editor = make_editor(CASES[name])
    plain, plain_each = _edited(editor)
    torch.set_default_dtype(dtype)
    try:
        other, other_each = _edited(editor)
        bound = generate(bind(model(), other), ASKED, max_new_tokens=3)
    finally:
        torch.set_default_dtype(torch.float32)
    _same(plain, other)
    _same(plain_each, other_each)
    assert bound == generate(bind(model(), plain), ASKED, max_new_tokens=3)


@pytest.mark.parametrize("name", list(CASES))
def test_autocast_changes_nothing(name):
    editor = make_editor(CASES[name])
    plain, plain_each = _edited(editor)
    with torch.autocast("cpu", torch.bfloat16):
        other, other_each = _edited(editor)
    _same(plain, other)
    _same(plain_each, other_each)


@pytest.mark.parametrize("name", list(CASES))
def test_the_default_device_changes_nothing(name):
    editor = make_editor(CASES[name])
    plain, plain_each = _edited(editor)
    torch.set_default_device("meta")
    try:
        other, other_each = _edited(editor)
    finally:
        torch.set_default_device(None)
    _same(plain, other)
    _same(plain_each, other_each)


def _edited(editor):
    state = editor.init(model(), seeded())
    return editor.edit(model(), state, ASKED)[0], editor.edit_each(model(), state, ASKED)


def _same(one, two):
    assert one.header == two.header
    assert one.tensors.keys() == two.tensors.keys()
    for key, tensor in one.tensors.items():
        assert tensor.dtype == two.tensors[key].dtype
        assert torch.equal(tensor, two.tensors[key]), key


# ------------------------------------------------------------------ edits each, from edits


@pytest.mark.parametrize("name", ["serac", "ike", "grace", "liveedit", "mend"])
def test_edits_each_from_a_state_that_holds_edits_keep_these_as_their_own(name, tmp_path):
    config = CASES.get(name) or configure(name)
    editor = make_editor(config)
    state = editor.init(model(), seeded())
    first = Query("what colour is it?", "red", (IMAGE,))
    _, state = editor.edit(model(), state, [first])
    stacked = editor.edit_each(model(), state, ASKED)
    save_delta(tmp_path / "stacked.safetensors", stacked)
    for held in (stacked, load_delta(tmp_path / "stacked.safetensors")):
        assert [edit.id for edit in held.header.shared_edits] == [state.edits[0].id]
        for delta, own in zip(unstack(held), stacked.header.edits):
            assert [edit.id for edit in delta.header.edits] == [state.edits[0].id, own.id]
            kept = remove(delta, [own.id])
            alone = editor.edit(model(), editor.init(model(), seeded()), [first])[0]
            assert kept.header.edits == alone.header.edits
            for key, tensor in alone.tensors.items():
                if not key.endswith(".radii"):  # GRACE: as the sequence of edits left them
                    torch.testing.assert_close(kept.tensors[key], tensor)
            others = remove(delta, [state.edits[0].id])
            assert [edit.id for edit in others.header.edits] == [own.id]
    one = select_edits(stacked, [1])
    assert [e.id for e in unstack(one)[0].header.edits][0] == state.edits[0].id


@pytest.mark.parametrize("name", ["serac", "liveedit"])
def test_an_edit_of_the_same_question_owns_what_it_replaced(name):
    editor = make_editor(CASES[name])
    state = editor.init(model(), seeded())
    _, state = editor.edit(model(), state, [ASKED[0]])
    stacked = editor.edit_each(model(), state, [ASKED[0]._replace(target="kim"), ASKED[1]])
    assert stacked.header.replaced_edits == ((0,), ())
    replaced, other = unstack(stacked)
    assert replaced.header.entries[0].edit_slots == (-1, 0)
    assert other.header.entries[0].edit_slots == (0, 1)


# ------------------------------------------------------------------ conflicts and differences

KINDS = ["finetune", "lora", "grace", "wise", "mend", "serac", "ike", "liveedit"]


def _alone(name, query):
    editor = make_editor(CASES.get(name) or configure(name, num_steps=2))
    return editor.edit(model(), editor.init(model(), seeded()), [query])[0]


@pytest.mark.parametrize("name", KINDS)
def test_one_question_with_two_answers_in_two_deltas_is_a_named_conflict(name):
    one, two = _alone(name, ASKED[0]), _alone(name, ASKED[0]._replace(target="kim"))
    with pytest.raises(InvalidInputError, match=f"edit {one.header.edits[0].id} of delta 1 and"):
        merge(one, two)


@pytest.mark.parametrize("name", KINDS)
def test_diff_speaks_of_every_kind(name, tmp_path, capsys):
    paths = []
    for number, query in enumerate(ASKED):
        paths.append(tmp_path / f"{number}.safetensors")
        save_delta(paths[-1], _alone(name, query))
    assert main(["diff", str(paths[0]), str(paths[0])]) == 0
    assert "the same change" in capsys.readouterr().out
    assert main(["diff", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "only in the left: edit" in shown
    assert "the same change" not in shown
    assert main(["diff", *map(str, paths), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["parameters"]) + len(report["memories"]) >= 1
