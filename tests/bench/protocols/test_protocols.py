"""Both protocols against the plain way: one edit, one question, one whole forward at a time."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from errata.adapters import from_module, tiny_model
from errata.bench.evaluation.evaluator import evaluate
from errata.bench.evaluation.fluency import perplexity_ratios
from errata.bench.evaluation.questions import (
    EvaluationConfig,
    ProbeQuestion,
    questions_of,
    validate_cases,
)
from errata.bench.protocols.sequential import run_sequential
from errata.bench.protocols.single import run_single
from errata.bench.storage.checkpoint import CheckpointFile
from errata.editors import make_editor
from errata.editors.finetune import FinetuneConfig
from errata.editors.lora import LoraConfig
from errata.functional import Case, Model, Query
from errata.functional.binding.bound_model import bind
from errata.functional.errors import ErrataError, InvalidInputError
from errata.functional.forward.generation import generate, generate_ids
from errata.functional.forward.prefix import delta_depth
from errata.functional.metrics.conventions import get_scorer
from errata.functional.metrics.readout import mean_kl, read_out
from errata.functional.metrics.scorers import exact_match, mean_nll, score_probe, token_accuracy
from errata.functional.metrics.text import (
    first_line,
    matches_answer,
    ngram_entropy,
    normalize_answer,
    tokenize_words,
)
from errata.functional.types import IGNORE_INDEX

EDITORS = {
    "last-mlp": FinetuneConfig(num_steps=4, lr=2e-2),
    "middle": FinetuneConfig(sites=("layers.1.mlp",), num_steps=2, lr=2e-2),
    "lora": LoraConfig(rank=2, num_steps=3, lr=3e-2),
}
TERMS = EvaluationConfig((get_scorer("errata"),))


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (40, 32), (shade, 255 - shade, 40))


def case(number: int) -> Case:
    shown = (picture(20 * number),)
    return Case(
        f"case {number}",
        Query(f"who is number {number}?", "bo the owl", shown),
        {
            "rephrase": (Query("and who is this?", "bo the owl", shown),),
            "image_locality": (
                Query("what is it?", "a far red house", (picture(200),)),
                Query("where?", "in a town", (picture(number),)),
            ),
            "text_locality": (Query("what is the capital of the country?", "old town"),),
        },
    )


CASES = [case(number) for number in range(5)]


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "blip2"])
def model(request) -> Model:
    return from_module(*tiny_model(request.param))


@pytest.fixture(scope="module")
def llava() -> Model:
    return from_module(*tiny_model("llava"))


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
    assert [(s.number, s.num_units, s.cases) for s in steps] == [(0, 2, 3), (1, 2, 2)]
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
    assert list(run_single(llava, editor, CASES, TERMS, completed={0, 1})) == []
    whole = list(run_sequential(llava, editor, CASES, TERMS, sequence_length=2, gaps=(1,)))
    for done in ({0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5, 6}):
        rest = list(
            run_sequential(
                llava, editor, CASES, TERMS, sequence_length=2, gaps=(1,), completed=done
            )
        )
        assert [step.number for step in rest] == [s.number for s in whole if s.number not in done]
        assert [step.results for step in rest] == [
            step.results for step in whole if step.number not in done
        ]


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
    assert [(s.number, s.cases) for s in steps] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 0),
        (4, 1),
        (5, 1),
        (6, 0),
    ]
    assert {s.num_units for s in steps} == {7}
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


def test_free_generation_stands_beside_teacher_forcing(llava):
    editor = make_editor(EDITORS["last-mlp"])
    terms = TERMS._replace(max_new_tokens=3)
    (step,) = run_single(llava, editor, CASES[:2], terms, batch_size=2)
    few = run_single(
        llava, editor, CASES[:2], terms._replace(generate_probes="success"), batch_size=2
    )
    state = editor.init(llava, torch.Generator().manual_seed(0))
    for got, other in zip(step.results, next(few).results, strict=True):
        edited = bind(llava, editor.edit(llava, state, [CASES[got.case_number].edit])[0])
        texts = [generate(one, [got.query], 3)[0] for one in (llava, edited)]
        for text, answer in zip(texts, (got.before, got.after)):
            assert answer.generation == first_line(text)
            assert answer.generation_match == matches_answer(text, got.query.target)
            words = tokenize_words(text)
            want = round(ngram_entropy(words), 4) if len(words) > 2 else None
            assert answer.ngram_entropy == want
        if "locality" in got.probe:
            assert got.generation_unchanged == (
                normalize_answer(first_line(texts[0])) == normalize_answer(first_line(texts[1]))
            )
            assert (
                other.before.generation
                is other.after.generation
                is other.after.generation_match
                is other.generation_unchanged
                is None
            )
        else:
            assert got.generation_unchanged is None
            assert (other.before, other.after) == (got.before, got.after)


def test_any_alias_counts_as_right_when_it_is_said(llava):
    editor = make_editor(EDITORS["last-mlp"])
    terms = TERMS._replace(max_new_tokens=3)
    one = CASES[0]
    (step,) = run_single(llava, editor, [one], terms)
    said = step.results[0].after.generation
    assert said
    assert not step.results[0].after.generation_match
    edit = one.edit._replace(aliases=("someone", said))
    (step,) = run_single(llava, editor, [one._replace(edit=edit)], terms)
    assert step.results[0].after.generation_match
    assert step.results[0].after.generation == said


@pytest.mark.parametrize("name", ["lora", "projector"])
def test_every_row_says_how_far_the_edit_moved_the_answer(model, name):
    projector = FinetuneConfig(sites=("projector",), num_steps=2, lr=1e-2)
    editor = make_editor(EDITORS.get(name, projector))
    (step,) = run_single(model, editor, CASES[:2], TERMS, batch_size=2)
    state = editor.init(model, torch.Generator().manual_seed(0))
    for got in step.results:
        edited = bind(model, editor.edit(model, state, [CASES[got.case_number].edit])[0])
        inputs = model.preprocess([got.query])
        logits = [
            one.decode(one.params, one.embed(one.params, inputs)).detach()
            for one in (model, edited)
        ]
        want = float(mean_kl(*logits, inputs.labels != IGNORE_INDEX))
        assert got.kl == pytest.approx(want, abs=2e-4)
    assert any(got.kl > 1e-3 for got in step.results)


def test_ppl_r_is_the_papers_formula(model):
    editor = make_editor(EDITORS["lora"])
    (step,) = run_single(model, editor, CASES[:2], TERMS._replace(ppl_r_tokens=4), batch_size=2)
    state = editor.init(model, torch.Generator().manual_seed(0))
    for got in step.results:
        if got.probe != "reliability":
            assert got.ppl_r is None
            continue
        edited = bind(model, editor.edit(model, state, [got.query])[0])
        inputs = edited.preprocess([got.query])
        (said,) = generate_ids(edited, inputs, 4)
        if not said:
            assert got.ppl_r is None
            continue
        ids = torch.cat([inputs.input_ids, torch.tensor([said])], 1)
        image = F.pad(inputs.image_mask, (0, len(said)))
        longer = inputs._replace(
            input_ids=ids, attention_mask=torch.ones_like(image), image_mask=image
        )
        with torch.no_grad():
            at = torch.arange(ids.shape[1] - 1)[None]
            batch = edited.embed(edited.params, longer)
            log_p = edited.decode(edited.params, batch, logit_positions=at).log_softmax(-1)
        found = -log_p.gather(-1, ids[:, 1:, None])[0, :, 0]
        behind = torch.arange(1, ids.shape[1]) >= inputs.input_ids.shape[1]
        given = found[~behind & ~image[0, 1:]].mean().exp()
        assert got.ppl_r == pytest.approx(float(found[behind].mean().exp() / given), rel=1e-3)


def test_nothing_said_behind_the_target_has_no_ppl_r(llava):
    silent = llava._replace(
        card=msgspec.structs.replace(llava.card, stop_ids=range(llava.card.vocab_size))
    )
    assert math.isnan(perplexity_ratios(silent, [CASES[0].edit], 4)[0])


def test_edits_below_the_decoder_run_edit_by_edit(llava):
    editor = make_editor(FinetuneConfig(sites=("projector",), num_steps=2, lr=1e-2))
    (step,) = run_single(llava, editor, CASES[:2], TERMS, batch_size=2)
    state = editor.init(llava, torch.Generator().manual_seed(0))
    for got in step.results:
        edited = bind(llava, editor.edit(llava, state, [CASES[got.case_number].edit])[0])
        agrees(edited, got.query, got.after)


def test_equal_questions_are_read_once(llava):
    seen: list[Query] = []

    def read(queries):
        seen.extend(queries)
        return llava.preprocess(queries)

    watched = llava._replace(preprocess=read)
    editor = make_editor(EDITORS["lora"])
    delta = editor.edit_each(llava, editor.init(llava, torch.Generator()), [c.edit for c in CASES])
    asks = [
        ProbeQuestion(probe, query, number)
        for number, one in enumerate(CASES)
        for probe, _, query in questions_of(one)
    ]
    got = evaluate(watched, bind(watched, delta), asks, delta_depth(llava, delta), TERMS)
    assert len(got) == len(asks) == 25
    # 17 different questions; the longest of each kind is read once more to measure its length
    assert len(seen) == len({(q.prompt, q.target, id(q.images)) for q in seen}) + 2 == 19


def test_a_case_that_can_not_be_read_is_named(llava):
    long = Case("too long", Query("why? " * 600, "bo", (picture(1),)))
    for protocol in (run_single, run_sequential):
        with pytest.raises(ErrataError, match="'too long'"):
            list(protocol(llava, make_editor(EDITORS["lora"]), [CASES[0], long], TERMS))


def test_empty_targets_and_twins_are_refused_together():
    blank = CASES[0]._replace(id="blank", edit=CASES[0].edit._replace(target=" "))
    with pytest.raises(InvalidInputError, match=r"'blank', reliability\[0\].*'case 1' comes twice"):
        validate_cases([blank, CASES[1], CASES[1]])


def test_weights_that_are_no_numbers_are_refused_by_name(llava):
    name = llava.card.resolve_site("layers.1.mlp.down") + ".weight"
    broken = llava._replace(params={**llava.params, name: llava.params[name] * math.nan})
    with pytest.raises(InvalidInputError, match=r"1 parameter\(s\) hold NaN .*layers\.1\.mlp"):
        list(run_single(broken, make_editor(EDITORS["last-mlp"]), CASES[:1], TERMS))


SETTINGS = """
output_dir = "decided by the test"
num_threads = 1
[cases]
source = "world"
num_cases = 3
[[models]]
id = "tiny/llava"
[[editors]]
type = "lora"
num_steps = 2
[[protocols]]
type = "single"
batch_size = 1
[[protocols]]
type = "sequential"
sequence_length = 2
"""


def test_a_run_that_is_killed_ends_with_the_same_bytes(tmp_path):
    """`killing.py demo.toml FOLDER --kills 10` does the same on a long run."""
    settings = tmp_path / "run.toml"
    settings.write_text(SETTINGS)
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, settings, tmp_path, "--kills", "3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "same=True" in done.stdout
    kills = int(done.stdout.partition("kills=")[2].partition(",")[0])
    assert kills >= 2, done.stdout  # the last may find the run ended a moment before
