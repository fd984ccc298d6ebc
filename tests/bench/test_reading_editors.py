"""Protocols with an editor that changes how questions are read."""

from __future__ import annotations

import json
import tomllib

import msgspec
import pytest
import torch

from errata import adapters
from errata.bench.cli import main
from errata.bench.corpora import corpus
from errata.bench.data import world
from errata.bench.probes import Ask, Terms, measure
from errata.bench.protocols import lifelong, reach_of, single
from errata.bench.settings import parse
from errata.editors import IkeConfig, configure, ike
from errata.editors.ike import PRESETS
from errata.functional import bind
from errata.functional.errors import BadInput
from errata.functional.metrics import scorer
from errata.functional.stacks import take

ALWAYS = msgspec.structs.replace(PRESETS["micro"], least=-1.0, least_look=-1.0)


@pytest.fixture(scope="module")
def model():
    return adapters.micro("llava")


def rows(steps) -> list[tuple]:
    return [
        (one.case.id, one.probe, one.index, one.scorer, one.score, one.after.text, one.ppl_r)
        for step in steps
        for one in step.results
    ]


def test_a_small_budget_reads_in_smaller_batches_and_says_the_same(model):
    cases = world.cases(3, relations=("home", "food"))
    scorers = tuple(map(scorer, ("errata", "easyedit")))
    wide = Terms(scorers, generate=4, ppl_r=4)
    found = [
        rows(single(model, ike(ALWAYS), cases, wide._replace(budget=size), together=3))
        for size in (1 << 30, 1 << 21)
    ]
    for one, two in zip(*found, strict=True):
        assert one[:4] == two[:4]
        assert one[4:6] == two[4:6]
    scores = {(row[1], row[3]): row[4] for row in found[0]}
    assert ("text_locality", "easyedit") in scores
    assert all(score is not None for score in scores.values())


def test_rows_that_an_edit_made_longer_are_compared_at_their_last_positions(model):
    """A question no fact is put before reads as ever: it agrees with itself everywhere."""
    case = world.cases(1)[0]
    editor = ike(PRESETS["micro"])
    delta = editor.each(model, editor.init(model, torch.Generator()), [case.edit])
    terms = Terms((scorer("easyedit"),))
    asks = [Ask("image_locality", query) for query in case.probes["image_locality"]]
    asks.append(Ask("same_entity_locality", case.edit))  # longer: the fact stands before it
    found = measure(model, bind(model, delta), asks, reach_of(model, delta), terms)
    assert [one.scores["easyedit"][1] for one in found[:-1]] == [1.0, 1.0, 1.0]
    changed = found[-1].scores["easyedit"][1]
    assert changed is not None
    assert changed < 1


def test_many_edits_asked_the_same_question_read_under_their_own(model):
    cases = world.cases(5, relations=("home",))
    editor = ike(PRESETS["micro"])
    state = editor.init(model, torch.Generator())
    delta = editor.each(model, state, [case.edit for case in cases])
    asks = [Ask("reliability", cases[0].edit, edit) for edit in range(5)]
    terms = Terms((scorer("errata"),), budget=1 << 20)
    found = measure(model, bind(model, delta), asks, reach_of(model, delta), terms)
    for edit, one in enumerate(found):
        alone = bind(model, take(delta, [edit]))
        (same,) = measure(model, alone, [asks[0]], reach_of(model, delta), terms)
        assert one.after == same.after
    assert found[0].after.exact


def test_a_lifelong_memory_keeps_its_first_fact(model):
    cases = world.cases(6, subjects="new", relations=("home", "food"))
    steps = list(
        lifelong(model, ike(PRESETS["micro"]), cases, Terms((scorer("errata"),)), lengths=[1, 6])
    )
    last = [one for one in steps[-1].results if one.probe == "reliability"]
    assert [one.number for one in last] == list(range(6))
    assert sum(one.score or 0 for one in last) >= 5


def test_demonstrations_are_named_in_a_settings_file(tmp_path):
    text = f"""
out = "{tmp_path / "out"}"
pictures = 0
[cases]
source = "world"
count = 2
[[models]]
id = "micro/llava"
[[editors]]
type = "ike"
preset = "micro"
k = 3
demonstrations = "world"
cases = 4
[[protocols]]
type = "single"
"""
    (tmp_path / "run.toml").write_text(text)
    assert main(["run", str(tmp_path / "run.toml")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    written = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert {row["editor"] for row in rows} == {"ike"}
    from errata.functional import io

    file = next((tmp_path / "out" / "deltas").rglob("*.safetensors"))
    entry = io.load(file).header.entries[0]
    assert (entry.k, entry.num_demos) == (3, 12)
    assert parse(text).editors[0].settings["demonstrations"] == "world"
    assert tomllib.loads(text)["editors"][0]["k"] == 3


def test_cases_for_demonstrations_come_from_files_too(tmp_path):
    record = {
        "subject": "x", "src": "who is it?", "pred": "ann", "rephrase": "who may it be?",
        "alt": "bo", "image": "a.jpg", "image_rephrase": "b.jpg", "loc": "capital of france?",
        "loc_ans": "paris", "m_loc": "c.jpg", "m_loc_q": "what is shown?", "m_loc_a": "a cat",
    }  # fmt: skip
    (tmp_path / "vqa.json").write_text(json.dumps([record] * 3))
    config = configure("ike", demonstrations=str(tmp_path / "vqa.json"), cases=2, k=1)
    cases = corpus(config)
    assert cases is not None
    assert [case.edit.target for case in cases] == ["bo", "bo"]
    assert corpus(IkeConfig()) is None
    with pytest.raises(BadInput, match="must be 'world' or an annotation file"):
        corpus(IkeConfig(demonstrations=str(tmp_path / "none.json")))
