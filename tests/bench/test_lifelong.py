"""Edits in one long sequence, all of them asked after 1, 10, 100, ...: protocol and curves."""

from __future__ import annotations

import pytest
import torch

from errata.adapters import adapt, tiny
from errata.bench.checkpoint import Marks
from errata.bench.data import world
from errata.bench.probes import Ask, Terms, measure
from errata.bench.protocols import lifelong, reach_of
from errata.bench.report import summarise
from errata.bench.report_html import curves
from errata.bench.run import run
from errata.bench.settings import parse
from errata.bench.sources import queries_of
from errata.editors import FinetuneConfig, make
from errata.functional.bind import bind
from errata.functional.metrics import scorer

CASES = world.cases(5)
TERMS = Terms((scorer("errata"),))
LENGTHS = (1, 3, 5)


@pytest.fixture(scope="module")
def llava():
    return adapt(*tiny("llava"))


@pytest.fixture(scope="module")
def editor():
    return make(FinetuneConfig(num_steps=2, lr=5e-3))


def test_after_n_edits_all_n_are_asked_of_one_model(llava, editor):
    steps = list(lifelong(llava, editor, CASES, TERMS, lengths=LENGTHS))
    assert [step.cases for step in steps] == [1] * 5
    asked = {step.number + 1: {one.number for one in step.results} for step in steps}
    assert asked == {1: {0}, 2: set(), 3: {0, 1, 2}, 4: set(), 5: {0, 1, 2, 3, 4}}
    assert {one.gap for one in steps[2].results} == {3}

    few = list(lifelong(llava, editor, CASES, TERMS, lengths=LENGTHS, asked=2))
    assert {one.number for one in few[4].results} == {0, 4}

    state = editor.init(llava, torch.Generator().manual_seed(0))
    for case in CASES[:3]:
        delta, state = editor.edit(llava, state, [case.edit])
    asks = [Ask(p, q) for case in CASES[:3] for p, _, q in queries_of(case)]
    want = measure(llava, bind(llava, delta), asks, reach_of(llava, delta), TERMS)
    assert [one.after for one in steps[2].results] == [one.after for one in want]


def test_a_killed_sequence_goes_on_with_the_same_steps(llava, editor, tmp_path):
    marks = Marks(tmp_path / "mark", "here", every=0.0)
    whole = list(lifelong(llava, editor, CASES, TERMS, lengths=LENGTHS))
    begun = lifelong(llava, editor, CASES, TERMS, lengths=LENGTHS, marks=marks)
    done = [next(begun) for _ in range(4)]
    begun.close()
    rest = lifelong(llava, editor, CASES, TERMS, lengths=LENGTHS, done=range(4), marks=marks)
    for got, want in zip([*done, *rest], whole, strict=True):
        assert (got.number, got.results) == (want.number, want.results)


def test_a_run_draws_curves_over_the_number_of_edits(tmp_path):
    text = f"""
        out = "{tmp_path / "run"}"
        [cases]
        source = "world"
        count = 3
        [[models]]
        id = "tiny/llava"
        [[editors]]
        type = "finetune"
        num_steps = 2
        [[protocols]]
        type = "lifelong"
        lengths = [1, 3]
    """
    folder = run(parse(text), text)
    from errata.bench.ledger import read_rows

    rows = read_rows(folder)
    assert {(leg.moment, leg.gap) for leg in summarise(rows)} == {("length", 1), ("length", 3)}
    drawn = [one for one in curves(rows) if one["family"] == "reliability"]
    assert [one["axis"] for one in drawn] == ["length"]
    assert [(point[0], point[-1]) for point in drawn[0]["points"]] == [(1, 1), (3, 3)]
    assert sorted(p.name for p in (folder / "deltas").rglob("*.safetensors")) == [
        "edits-00001.safetensors", "edits-00003.safetensors",
    ]  # fmt: skip
