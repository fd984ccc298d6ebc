"""Scores of protocols: free generation, aliases, KL, PPL_r, refusals, and a killed run."""

from __future__ import annotations

import math
import subprocess
import sys

import msgspec
import pytest
import torch
import torch.nn.functional as F

from errata.bench.evaluation.evaluator import evaluate
from errata.bench.evaluation.fluency import perplexity_ratios
from errata.bench.evaluation.questions import (
    ProbeQuestion,
    questions_of,
    validate_cases,
)
from errata.bench.protocols.sequential import run_sequential
from errata.bench.protocols.single import run_single
from errata.editors import make_editor
from errata.editors.finetune import FinetuneConfig
from errata.functional import Case, Query
from errata.functional.binding.bound_model import bind
from errata.functional.errors import ErrataError, InvalidInputError
from errata.functional.forward.generation import generate, generate_ids
from errata.functional.forward.prefix import delta_depth
from errata.functional.metrics.readout import mean_kl
from errata.functional.metrics.text import (
    first_line,
    matches_answer,
    ngram_entropy,
    normalize_answer,
    tokenize_words,
)
from errata.functional.types import IGNORE_INDEX
from tests.bench.protocols.test_protocols import (
    CASES,
    EDITORS,
    TERMS,
    agrees,
    make_image,
)


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
        later = torch.arange(1, ids.shape[1]) >= inputs.input_ids.shape[1]
        given = found[~later & ~image[0, 1:]].mean().exp()
        assert got.ppl_r == pytest.approx(float(found[later].mean().exp() / given), rel=1e-3)


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
    long = Case("too long", Query("why? " * 600, "bo", (make_image(1),)))
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
    """`python -m errata.bench.robustness.crash_runs demo.toml FOLDER` does so on a long run."""
    settings = tmp_path / "run.toml"
    settings.write_text(SETTINGS)
    command = ["-W", "ignore", "-m", "errata.bench.robustness.crash_runs"]
    done = subprocess.run(
        [sys.executable, *command, settings, tmp_path, "--kills", "3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "same=True" in done.stdout
    kills = int(done.stdout.partition("kills=")[2].partition(",")[0])
    assert kills >= 2, done.stdout  # the last may find the run ended a moment before
