"""Edits in one long sequence, all of them asked after 1, 10, 100, ...: protocol and curves."""

from __future__ import annotations

import pytest
import torch

from errata.adapters import from_module, tiny_model
from errata.bench.data.world import cases
from errata.bench.evaluation.evaluator import evaluate
from errata.bench.evaluation.questions import EvaluationConfig, ProbeQuestion, questions_of
from errata.bench.protocols.lifelong import run_lifelong
from errata.bench.report.curves import compute_curves
from errata.bench.report.summary import summarize
from errata.bench.runs.runner import run
from errata.bench.runs.settings_file import parse_settings
from errata.bench.storage.checkpoint import CheckpointFile
from errata.editors import make_editor
from errata.editors.finetune import FinetuneConfig
from errata.functional.binding.bound_model import bind
from errata.functional.forward.prefix import delta_depth
from errata.functional.metrics.conventions import get_scorer

CASES = cases.cases(5)
TERMS = EvaluationConfig((get_scorer("errata"),))
LENGTHS = (1, 3, 5)


@pytest.fixture(scope="module")
def llava():
    return from_module(*tiny_model("llava"))


@pytest.fixture(scope="module")
def editor():
    return make_editor(FinetuneConfig(num_steps=2, lr=5e-3))


def test_after_n_edits_all_n_are_asked_of_one_model(llava, editor):
    steps = list(run_lifelong(llava, editor, CASES, TERMS, eval_after=LENGTHS))
    assert [step.cases for step in steps] == [1] * 5
    asked = {step.units[0] + 1: {one.case_number for one in step.results} for step in steps}
    assert asked == {1: {0}, 2: set(), 3: {0, 1, 2}, 4: set(), 5: {0, 1, 2, 3, 4}}
    assert {one.gap for one in steps[2].results} == {3}

    few = list(run_lifelong(llava, editor, CASES, TERMS, eval_after=LENGTHS, max_evaluated=2))
    assert {one.case_number for one in few[4].results} == {0, 4}

    state = editor.init(llava, torch.Generator().manual_seed(0))
    for case in CASES[:3]:
        delta, state = editor.edit(llava, state, [case.edit])
    asks = [ProbeQuestion(p, q) for case in CASES[:3] for p, _, q in questions_of(case)]
    want = evaluate(llava, bind(llava, delta), asks, delta_depth(llava, delta), TERMS)
    assert [one.after for one in steps[2].results] == [one.after for one in want]


def test_a_killed_sequence_goes_on_with_the_same_steps(llava, editor, tmp_path):
    marks = CheckpointFile(tmp_path / "mark", "here", every=0.0)
    whole = list(run_lifelong(llava, editor, CASES, TERMS, eval_after=LENGTHS))
    begun = run_lifelong(llava, editor, CASES, TERMS, eval_after=LENGTHS, checkpoint=marks)
    done = [next(begun) for _ in range(4)]
    begun.close()
    rest = run_lifelong(
        llava, editor, CASES, TERMS, eval_after=LENGTHS, completed=range(4), checkpoint=marks
    )
    for got, want in zip([*done, *rest], whole, strict=True):
        assert (got.units, got.results) == (want.units, want.results)


def test_a_run_draws_curves_over_the_number_of_edits(tmp_path):
    text = f"""
        output_dir = "{tmp_path / "run"}"
        [cases]
        source = "world"
        num_cases = 3
        [[models]]
        id = "tiny/llava"
        [[editors]]
        type = "finetune"
        num_steps = 2
        [[protocols]]
        type = "lifelong"
        eval_after = [1, 3]
    """
    folder = run(parse_settings(text), text)
    from errata.bench.storage.results_log import read_rows

    rows = read_rows(folder)
    assert {(leg.evaluated_at, leg.gap) for leg in summarize(rows)} == {
        ("after_length", 1),
        ("after_length", 3),
    }
    drawn = [one for one in compute_curves(rows) if one["family"] == "reliability"]
    assert [one["axis"] for one in drawn] == ["length"]
    assert [(point[0], point[-1]) for point in drawn[0]["points"]] == [(1, 1), (3, 3)]
    assert sorted(p.name for p in (folder / "deltas").rglob("*.safetensors")) == [
        "edits-00001.safetensors",
        "edits-00003.safetensors",
    ]
