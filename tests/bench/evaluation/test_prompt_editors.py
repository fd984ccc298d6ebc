"""Protocols with an editor that changes how questions are read."""

from __future__ import annotations

import json
import tomllib

import msgspec
import pytest
import torch

from errata import adapters
from errata.bench.cli.main import main
from errata.bench.data.demonstrations import demonstration_cases
from errata.bench.data.world import cases as world
from errata.bench.evaluation.evaluator import evaluate
from errata.bench.evaluation.questions import EvaluationConfig, ProbeQuestion
from errata.bench.protocols.lifelong import run_lifelong
from errata.bench.protocols.single import run_single
from errata.bench.runs.settings_file import parse_settings
from errata.editors import configure
from errata.editors.ike import IkeConfig, ike_editor
from errata.editors.ike.config import PRESETS
from errata.functional import bind
from errata.functional.deltas.stacking import select_edits
from errata.functional.errors import InvalidInputError
from errata.functional.forward.prefix import delta_depth
from errata.functional.metrics.conventions import get_scorer

ALWAYS = msgspec.structs.replace(PRESETS["micro"], min_similarity=-1.0, min_image_similarity=-1.0)


@pytest.fixture(scope="module")
def model():
    return adapters.load_micro("llava")


def rows(steps) -> list[tuple]:
    return [
        (one.case.id, one.probe, one.index, one.scorer, one.score, one.after.text, one.ppl_r)
        for step in steps
        for one in step.results
    ]


def test_a_small_budget_reads_in_smaller_batches_and_says_the_same(model):
    cases = world.cases(3, relations=("home", "food"))
    scorers = tuple(map(get_scorer, ("errata", "easyedit")))
    wide = EvaluationConfig(scorers, max_new_tokens=4, ppl_r_tokens=4)
    found = [
        rows(
            run_single(
                model, ike_editor(ALWAYS), cases, wide._replace(memory_bytes=size), batch_size=3
            )
        )
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
    editor = ike_editor(PRESETS["micro"])
    delta = editor.edit_each(model, editor.init(model, torch.Generator()), [case.edit])
    terms = EvaluationConfig((get_scorer("easyedit"),))
    asks = [ProbeQuestion("image_locality", query) for query in case.probes["image_locality"]]
    asks.append(
        ProbeQuestion("same_entity_locality", case.edit)
    )  # longer: the fact stands before it
    found = evaluate(model, bind(model, delta), asks, delta_depth(model, delta), terms)
    assert [one.scores["easyedit"][1] for one in found[:-1]] == [1.0, 1.0, 1.0]
    changed = found[-1].scores["easyedit"][1]
    assert changed is not None
    assert changed < 1


def test_many_edits_asked_the_same_question_read_under_their_own(model):
    cases = world.cases(5, relations=("home",))
    editor = ike_editor(PRESETS["micro"])
    state = editor.init(model, torch.Generator())
    delta = editor.edit_each(model, state, [case.edit for case in cases])
    asks = [ProbeQuestion("reliability", cases[0].edit, edit) for edit in range(5)]
    terms = EvaluationConfig((get_scorer("errata"),), memory_bytes=1 << 20)
    found = evaluate(model, bind(model, delta), asks, delta_depth(model, delta), terms)
    for edit, one in enumerate(found):
        alone = bind(model, select_edits(delta, [edit]))
        (same,) = evaluate(model, alone, [asks[0]], delta_depth(model, delta), terms)
        assert one.after == same.after
    assert found[0].after.exact_match


def test_a_lifelong_memory_keeps_its_first_fact(model):
    cases = world.cases(6, subjects="new", relations=("home", "food"))
    steps = list(
        run_lifelong(
            model,
            ike_editor(PRESETS["micro"]),
            cases,
            EvaluationConfig((get_scorer("errata"),)),
            eval_after=[1, 6],
        )
    )
    last = [one for one in steps[-1].results if one.probe == "reliability"]
    assert [one.case_number for one in last] == list(range(6))
    assert sum(one.score or 0 for one in last) >= 5


def test_demonstrations_are_named_in_a_settings_file(tmp_path):
    text = f"""
output_dir = "{tmp_path / "out"}"
num_thumbnails = 0
[cases]
source = "world"
num_cases = 2
[[models]]
id = "micro/llava"
[[editors]]
type = "ike"
preset = "micro"
num_demonstrations = 3
demonstration_source = "world"
num_source_cases = 4
[[protocols]]
type = "single"
"""
    (tmp_path / "run.toml").write_text(text)
    assert main(["run", str(tmp_path / "run.toml")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    written = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert {row["editor"] for row in rows} == {"ike"}
    from errata.functional.deltas import serialization as io

    file = next((tmp_path / "out" / "deltas").rglob("*.safetensors"))
    entry = io.load_delta(file).header.entries[0]
    assert (entry.num_demonstrations, entry.num_stored_demonstrations) == (3, 12)
    assert parse_settings(text).editors[0].settings["demonstration_source"] == "world"
    assert tomllib.loads(text)["editors"][0]["num_demonstrations"] == 3


def test_cases_for_demonstrations_come_from_files_too(tmp_path):
    record = {
        "subject": "x",
        "src": "who is it?",
        "pred": "ann",
        "rephrase": "who may it be?",
        "alt": "bo",
        "image": "a.jpg",
        "image_rephrase": "b.jpg",
        "loc": "capital of france?",
        "loc_ans": "paris",
        "m_loc": "c.jpg",
        "m_loc_q": "what is shown?",
        "m_loc_a": "a cat",
    }
    (tmp_path / "vqa.json").write_text(json.dumps([record] * 3))
    config = configure(
        "ike",
        demonstration_source=str(tmp_path / "vqa.json"),
        num_source_cases=2,
        num_demonstrations=1,
    )
    cases = demonstration_cases(config)
    assert cases is not None
    assert [case.edit.target for case in cases] == ["bo", "bo"]
    assert demonstration_cases(IkeConfig()) is None
    with pytest.raises(InvalidInputError, match="must be 'world' or an annotation file"):
        demonstration_cases(IkeConfig(demonstration_source=str(tmp_path / "none.json")))
