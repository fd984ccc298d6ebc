"""What an edit costs is counted, not timed: rows through decoder layers, looks at images.

`reference/easyedit.md` has what the field's editors run per edit and what would do ("attainable"):
the base over each question once, then, for every step and every probe, only the layers from the
edited one up. Legend: N layers · l the lowest layer edited · U distinct questions of a case, its
edit among them · A probes asked.
"""

from __future__ import annotations

import functools

import pytest
import torch
from PIL import Image

from errata import adapters
from errata.adapters.hf.layout import ATTENTION_OUTPUT
from errata.adapters.hf.runner import ModuleRunner
from errata.bench.evaluation.base_pass import SharedBasePass
from errata.bench.evaluation.questions import EvaluationConfig, questions_of
from errata.bench.perf import whole_forward
from errata.bench.protocols.lifelong import run_lifelong
from errata.bench.protocols.sequential import run_sequential
from errata.bench.protocols.single import run_single
from errata.editors import METHODS, make_editor
from errata.functional import Case, Query
from errata.functional.metrics.conventions import SCORERS
from tests.editors.methods import COSTS, LAYERS, STEPS

TERMS = EvaluationConfig(scorers=(SCORERS["errata"],), memory_bytes=1 << 26)


@functools.cache
def tiny(name: str):
    return adapters.from_module(*adapters.tiny_model(name, num_layers=LAYERS))


def make_image(shade: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (shade % 256, 255 - shade % 256, 40))


@functools.cache
def cases(count: int, first: int = 0) -> tuple[Case, ...]:
    made = []
    for k in range(first, first + count):
        seen, other = (make_image(40 * k),), (make_image(40 * k + 20),)
        edit = Query(f"who is number {k}?", "bo", seen)
        probes = {
            "reliability": (edit,),
            "rephrase": (Query(f"and what is {k} called?", "bo", seen),),
            "image_rephrase": (edit._replace(images=other),),
            "text_locality": (Query(f"where is town {k}?", "in the north"),),
            "image_locality": (Query("what colour?", "red", (make_image(40 * k + 30),)),),
        }
        made.append(Case(f"case-{k}", edit, probes))
    return tuple(made)


class Count:
    """Rows through decoder layers while it is patched in, and images encoded."""

    def __init__(self, patch: pytest.MonkeyPatch, model) -> None:
        self.rows = self.few = self.looks = 0
        layer = ModuleRunner.run_layer

        def counted(body, skeleton, params, number, hidden, extras, log):
            if ATTENTION_OUTPUT in extras:  # only the scored positions, after the last attention
                self.few += hidden.shape[0]
            else:
                self.rows += hidden.shape[0]
            return layer(body, skeleton, params, number, hidden, extras, log)

        patch.setattr(ModuleRunner, "run_layer", counted)
        tower = model.decode.__self__.runner.replica().get_submodule(model.card.vision_tower)
        self._hook = tower.register_forward_hook(self._look)

    def _look(self, *_) -> None:
        self.looks += 1

    def done(self) -> None:
        self._hook.remove()


def said(steps) -> dict:
    found = [result for step in steps for result in step.results]
    return {(r.case.id, r.probe, r.index): (r.before.text, r.after.text) for r in found}


@pytest.mark.parametrize("kind", list(METHODS))
def test_no_more_rows_than_attainable(kind, monkeypatch):
    model, asked, editor = tiny("llava"), cases(4), make_editor(COSTS[kind].config)
    shared = SharedBasePass(model, asked, TERMS)
    count = Count(monkeypatch, model)
    shared.record_depth(editor)
    try:
        steps = list(run_single(model, editor, asked, TERMS, base_pass=shared))
    finally:
        count.done()
    assert len(said(steps)) == 20
    assert count.rows <= len(asked) * COSTS[kind].rows
    assert count.few <= len(asked) * (10 + STEPS)
    assert count.looks <= 3 * len(asked)  # three images a case


def test_another_editor_runs_no_row_of_the_base_again(monkeypatch):
    model, asked = tiny("llava"), cases(4)
    shared = SharedBasePass(model, asked, TERMS)
    made = [make_editor(COSTS[kind].config) for kind in ("finetune", "grace", "mend")]
    for editor in made:
        shared.record_depth(editor)
    list(run_single(model, made[0], asked, TERMS, base_pass=shared))
    count = Count(monkeypatch, model)
    try:
        for kind, editor in zip(("grace", "mend"), made[1:]):
            before = count.rows
            list(run_single(model, editor, asked, TERMS, base_pass=shared))
            own = COSTS[kind].rows - 5 * LAYERS
            assert count.rows - before <= len(asked) * own
    finally:
        count.done()
    assert count.looks == 0


@pytest.mark.parametrize(
    ("protocol", "num_evaluated"),
    [(run_single, 4), (run_sequential, 4 + 4), (run_lifelong, 1 + 4)],  # after each, at the end
)
def test_every_protocol_takes_the_base_from_the_shared_pass(protocol, num_evaluated, monkeypatch):
    """The second editor of a run adds no row of the base, in any protocol."""
    model, asked, editor = tiny("llava"), cases(4), make_editor(COSTS["grace"].config)
    more = {"eval_after": (1, 4)} if protocol is run_lifelong else {}

    def rows(**options) -> int:
        count = Count(monkeypatch, model)
        try:
            list(protocol(model, editor, asked, TERMS, **options, **more))
        finally:
            count.done()
        return count.rows

    alone = rows()
    shared = SharedBasePass(model, asked, TERMS)
    shared.record_depth(editor)
    first, second = rows(base_pass=shared), rows(base_pass=shared)
    edited = COSTS["grace"].edit_rows * 4 + COSTS["grace"].layers_above * num_evaluated * 5
    assert second <= edited
    assert first <= edited + 4 * 5 * LAYERS
    assert second < alone


@pytest.mark.parametrize("kind", list(METHODS))
@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_answers_are_those_of_whole_forwards(name, kind):
    """Edits side by side on shared rows = one by one, each step and probe from the pixels."""
    model, asked, editor = tiny(name), cases(3), make_editor(COSTS[kind].config)
    shared = SharedBasePass(model, asked, TERMS)
    got = said(run_single(model, editor, asked, TERMS, base_pass=shared))
    slow = whole_forward.run_single(model, editor, asked, questions_of)
    want = {(c.id, *key): pair for c, one in zip(asked, slow) for key, pair in one.items()}
    assert got == want


@pytest.mark.parametrize("protocol", [run_single, run_sequential, run_lifelong])
def test_shared_rows_change_no_result(protocol):
    model, asked, editor = tiny("qwen2_vl"), cases(5), make_editor(COSTS["grace"].config)
    more = {"eval_after": (1, 3)} if protocol is run_lifelong else {}
    plain = [r for s in protocol(model, editor, asked, TERMS, **more) for r in s.results]
    shared = SharedBasePass(model, asked, TERMS)
    found = protocol(model, editor, asked, TERMS, base_pass=shared, **more)
    results = [r for s in found for r in s.results]
    assert len(results) == len(plain)
    for one, two in zip(plain, results):
        assert (one.case_number, one.probe, one.evaluated_at, one.gap) == (
            two.case_number,
            two.probe,
            two.evaluated_at,
            two.gap,
        )
        assert (one.before.text, one.after.text) == (two.before.text, two.after.text)
        assert one.after.nll == pytest.approx(two.after.nll, abs=2e-4)


def test_pages_do_not_hang_on_what_was_asked_before():
    """Rows have the same bits for every caller, so a killed run ends with the same bytes."""
    model, asked = tiny("llava"), cases(6)
    editor = make_editor(COSTS["finetune"].config)
    small = TERMS._replace(memory_bytes=1 << 21)
    first, second = SharedBasePass(model, asked, small), SharedBasePass(model, asked, small)
    second.load([4])
    second.load([1])
    got = []
    for shared in (first, second):
        shared.load([3])
        inputs = shared.model.preprocess([asked[3].edit])
        known = shared.model.prefix_cache
        got.append((known.lookup_logits(inputs), known.lookup(inputs, 2, False).hidden_states))
    assert torch.equal(got[0][0], got[1][0])
    assert torch.equal(got[0][1], got[1][1])
    assert said(run_single(model, editor, asked, small, base_pass=first)) == said(
        run_single(model, editor, asked, small, base_pass=second)
    )


def test_what_is_kept_is_bounded():
    model, asked = tiny("llava"), cases(12)
    shared = SharedBasePass(model, asked, TERMS._replace(memory_bytes=1 << 20))
    most = 0
    for number in range(12):
        shared.load([number])
        most = max(most, shared.num_bytes)
    page = shared.bytes_per_case * 16
    assert 0 < most <= (1 << 19) + page
