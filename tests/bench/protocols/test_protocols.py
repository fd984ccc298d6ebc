"""Both protocols against the plain way: one edit, one question, one whole forward at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from PIL import Image

from errata.bench.evaluation.questions import (
    EvaluationConfig,
    questions_of,
)
from errata.bench.protocols.lifelong import run_lifelong
from errata.bench.protocols.sequential import run_sequential
from errata.bench.protocols.single import run_single
from errata.bench.storage.checkpoint import CheckpointFile
from errata.editors import make_editor
from errata.editors.finetune import FinetuneConfig
from errata.editors.lora import LoraConfig
from errata.functional import Case, Model, Query
from errata.functional.binding.bound_model import bind
from errata.functional.errors import EditDivergedError
from errata.functional.metrics.conventions import get_scorer
from errata.functional.metrics.readout import read_out
from errata.functional.metrics.scorers import exact_match, mean_nll, score_probe, token_accuracy
from errata.functional.types import IGNORE_INDEX

EDITORS = {
    "last-mlp": FinetuneConfig(num_steps=4, lr=2e-2),
    "middle": FinetuneConfig(sites=("layers.1.mlp",), num_steps=2, lr=2e-2),
    "lora": LoraConfig(rank=2, num_steps=3, lr=3e-2),
}
TERMS = EvaluationConfig((get_scorer("errata"),))


def make_image(shade: int) -> Image.Image:
    return Image.new("RGB", (40, 32), (shade, 255 - shade, 40))


def case(number: int) -> Case:
    shown = (make_image(20 * number),)
    return Case(
        f"case {number}",
        Query(f"who is number {number}?", "bo the owl", shown),
        {
            "rephrase": (Query("and who is this?", "bo the owl", shown),),
            "image_locality": (
                Query("what is it?", "a far red house", (make_image(200),)),
                Query("where?", "in a town", (make_image(number),)),
            ),
            "text_locality": (Query("what is the capital of the country?", "old town"),),
        },
    )


CASES = [case(number) for number in range(5)]


def plain(model: Model, query: Query) -> tuple[list[int], float, float, float]:
    """(likeliest ids, accuracy, exact, nll) of one question, from one whole forward."""
    found = read_out(model, model.preprocess([query]))
    ids = found.top_ids[..., 0]
    keep = found.labels[0] != IGNORE_INDEX
    values = token_accuracy(ids, found.labels), exact_match(ids, found.labels)
    return (ids[0][keep].tolist(), *map(float, values), float(mean_nll(found.nll, found.labels)))


def agrees(model: Model, query: Query, got) -> None:
    ids, accuracy, exact, nll = plain(model, query)
    assert got.text == model.detokenize(ids).strip()
    assert got.accuracy == pytest.approx(accuracy, abs=1e-4)
    assert got.exact_match == (exact == 1)
    assert got.nll == pytest.approx(nll, abs=5e-4)


@pytest.mark.parametrize("name", list(EDITORS))
def test_single_is_what_the_plain_way_gives(model, name):
    editor = make_editor(EDITORS[name])
    versions = {n: t._version for n, t in model.params.items()}
    steps = list(run_single(model, editor, CASES, TERMS, batch_size=3))
    assert [(s.units, s.cases) for s in steps] == [((0, 1, 2), 3), ((3, 4), 2)]
    results = [one for step in steps for one in step.results]
    wanted = [(n, p, i) for n, c in enumerate(CASES) for p, i, _ in questions_of(c)]
    assert [(r.case_number, r.probe, r.index) for r in results] == wanted
    state = editor.init(model, torch.Generator().manual_seed(0))
    for number, one in enumerate(CASES):
        edited = bind(model, editor.edit(model, state, [one.edit])[0])
        for got in results[number * 5 : number * 5 + 5]:
            agrees(model, got.query, got.before)
            agrees(edited, got.query, got.after)
    assert {n: t._version for n, t in model.params.items()} == versions


def test_scores_are_those_of_the_scorer(llava):
    names = ["errata", "easyedit", "comprehendedit"]
    terms = EvaluationConfig(tuple(map(get_scorer, names)))
    editor = make_editor(EDITORS["lora"])
    (step,) = run_single(llava, editor, CASES[:2], terms, batch_size=2)
    state = editor.init(llava, torch.Generator().manual_seed(0))
    assert [r.scorer for r in step.results[:3]] == names
    for got in step.results:
        edited = bind(llava, editor.edit(llava, state, [CASES[got.case_number].edit])[0])
        rule = get_scorer(got.scorer)
        pair = [
            read_out(
                one,
                one.preprocess([got.query]),
                k=rule.num_ranks,
                all_positions=rule.needs_all_positions,
            )
            for one in (llava, edited)
        ]
        want = score_probe(rule, got.probe, *pair)
        kept = want.after if want.agreement is None else want.agreement
        assert got.base == pytest.approx(float(want.before), abs=1e-4)
        assert got.score == pytest.approx(float(kept), abs=1e-4)


def test_finished_steps_are_left_out_and_the_rest_is_the_same(llava):
    editor = make_editor(EDITORS["last-mlp"])
    every = list(run_single(llava, editor, CASES, TERMS))
    assert [step.cases for step in every] == [1, 4]
    (late,) = run_single(llava, editor, CASES, TERMS, completed={0})
    assert late.results == every[1].results
    assert list(run_single(llava, editor, CASES, TERMS, completed=range(5))) == []
    whole = list(run_sequential(llava, editor, CASES, TERMS, sequence_length=2, gaps=(1,)))
    for done in ({0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5, 6}):
        rest = list(
            run_sequential(
                llava, editor, CASES, TERMS, sequence_length=2, gaps=(1,), completed=done
            )
        )
        assert [step.units for step in rest] == [s.units for s in whole if not done & {*s.units}]
        assert [step.results for step in rest] == [
            step.results for step in whole if not done & {*step.units}
        ]


@pytest.mark.parametrize("bad", [{1}, {0}, {0, 1, 2, 3, 4}])
def test_an_edit_that_diverged_is_marked_and_counts_as_not_made(llava, bad):
    """Its case keeps the base's answers; all others are as if it had not been asked."""
    editor = make_editor(EDITORS["last-mlp"])
    broken = [CASES[n].edit for n in bad]

    def check(queries):
        hit = [n for n, query in enumerate(queries) if any(query is one for one in broken)]
        if hit:
            raise EditDivergedError("finetune", hit, len(queries))

    def edit_each(model, state, queries):
        check(queries)
        return editor.edit_each(model, state, queries)

    def edit(model, state, queries):
        check(queries)
        return editor.edit(model, state, queries)

    faulty = editor._replace(edit=edit, edit_each=edit_each)
    results = [r for s in run_single(llava, faulty, CASES, TERMS) for r in s.results]
    assert {r.case_number for r in results if r.fault} == bad
    assert all("diverged" in r.fault for r in results if r.case_number in bad)
    for r in results:
        if r.fault:
            assert (r.before.text, r.before.accuracy) == (r.after.text, r.after.accuracy)
    for run in (
        partial(run_sequential, sequence_length=5),
        partial(run_lifelong, eval_after=(1, 2, 5)),
    ):
        steps = list(run(llava, faulty, CASES, TERMS))
        assert len({n for step in steps for n in step.units}) == sum(len(s.units) for s in steps)
        asked = [r for s in steps for r in s.results if r.fault]
        assert {r.case_number for r in asked} <= bad
    good = editor.edit(
        llava, editor.init(llava, torch.Generator().manual_seed(0)), [CASES[3].edit]
    )[0]
    if bad == {0, 1, 2, 3, 4}:
        assert not any(step.deltas for step in steps)
    else:
        assert good.tensors.keys() == next(iter(steps[-1].deltas.values())).tensors.keys()


def test_a_small_budget_makes_small_batches_and_the_same_answers(llava):
    editor = make_editor(EDITORS["lora"])
    wide = list(run_single(llava, editor, CASES, TERMS))
    narrow = list(run_single(llava, editor, CASES, TERMS._replace(memory_bytes=1)))
    assert [step.cases for step in wide] == [1, 4]
    assert [step.cases for step in narrow] == [1] * 5
    for one, two in zip(
        (r for s in wide for r in s.results), (r for s in narrow for r in s.results)
    ):
        assert (one.before.text, one.after.text) == (two.before.text, two.after.text)
        assert one.after.nll == pytest.approx(two.after.nll, abs=5e-4)


def test_sequential_threads_the_state_and_starts_groups_from_the_base(llava):
    editor = make_editor(EDITORS["middle"])
    steps = list(run_sequential(llava, editor, CASES, TERMS, sequence_length=3, gaps=(1,)))
    assert [(*s.units, s.cases) for s in steps] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 0),
        (4, 1),
        (5, 1),
        (6, 0),
    ]
    assert [list(s.deltas) for s in steps if s.deltas] == [["group-0000"], ["group-0001"]]
    asked = [
        (r.evaluated_at, r.gap, r.case_number)
        for s in steps
        for r in s.results
        if r.probe == "rephrase"
    ]
    assert asked == [
        ("after_edit", 0, 0),
        ("after_edit", 0, 1),
        ("after_gap", 1, 0),
        ("after_edit", 0, 2),
        ("after_gap", 1, 1),
        ("end", 2, 0),
        ("end", 1, 1),
        ("end", 0, 2),
        ("after_edit", 0, 3),
        ("after_edit", 0, 4),
        ("after_gap", 1, 3),
        ("end", 1, 3),
        ("end", 0, 4),
    ]
    for first in (0, 3):
        state = editor.init(llava, torch.Generator().manual_seed(0))
        for number in range(first, min(first + 3, 5)):
            delta, state = editor.edit(llava, state, [CASES[number].edit])
            edited = bind(llava, delta)
            (own,) = [
                r
                for s in steps
                for r in s.results
                if (r.evaluated_at, r.case_number, r.probe) == ("after_edit", number, "reliability")
            ]
            agrees(edited, own.query, own.after)
            agrees(llava, own.query, own.before)
        for got in steps[3 if first == 0 else 6].results:
            agrees(edited, got.query, got.after)


@pytest.mark.parametrize("name", ["lora", "last-mlp"])
def test_a_mark_stands_for_the_edits_before_it(llava, name, tmp_path):
    editor, marks = make_editor(EDITORS[name]), CheckpointFile(tmp_path / "state", "run", every=0)
    whole = list(run_sequential(llava, editor, CASES, TERMS, sequence_length=5, checkpoint=marks))
    made: list[str] = []

    def edit(model, state, queries):
        made.append(queries[0].prompt)
        return editor.edit(model, state, queries)

    watched = editor._replace(edit=edit)
    for done, again in ((3, 2), (4, 1), (5, 0)):
        stopped = run_sequential(llava, editor, CASES, TERMS, sequence_length=5, checkpoint=marks)
        for _ in range(done):
            next(stopped)
        next(stopped)  # the step after the last one kept is computed, and lost with the process
        stopped.close()
        made.clear()
        rest = run_sequential(
            llava,
            watched,
            CASES,
            TERMS,
            sequence_length=5,
            completed=set(range(done)),
            checkpoint=marks,
        )
        for one, want in zip(rest, whole[done:], strict=True):
            assert one.results == want.results
            for file, delta in one.deltas.items():
                assert delta.header == want.deltas[file].header
                for tensor, value in delta.tensors.items():
                    assert torch.equal(value, want.deltas[file].tensors[tensor])
        assert len(made) == again
