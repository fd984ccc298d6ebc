"""Ask a model and its edited selves the same questions, from a prefix computed once per row.

Equal questions are read once, run once up to the lowest edited place, and answered once by the
base; each edit that asks them continues from there. Legend: B unique rows · A asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.bench.evaluation.batching import MAX_ROWS, check_finite, make_batches, row_num_bytes
from errata.bench.evaluation.fluency import perplexity_ratios
from errata.bench.evaluation.profiling import section
from errata.bench.evaluation.questions import (
    EvaluationConfig,
    ProbeQuestion,
    ProbeResult,
    query_key,
)
from errata.bench.storage.results_log import ProbeAnswer
from errata.functional import Inputs, Model, Query
from errata.functional.forward import batches, prefix
from errata.functional.forward.generation import generate
from errata.functional.forward.prefix import EditDepth
from errata.functional.metrics.conventions import get_probe
from errata.functional.metrics.readout import Readout, concat_readouts, read_out
from errata.functional.metrics.scorers import exact_match, mean_nll, score_probe, token_accuracy
from errata.functional.metrics.text import first_line, matches_answer, ngram_entropy, tokenize_words
from errata.functional.types import IGNORE_INDEX

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    edited_model: Model,
    questions: Sequence[ProbeQuestion],
    depth: EditDepth,
    evaluation_config: EvaluationConfig,
) -> list[ProbeResult]:
    """Answers of the base, and of the edit that each question names, in the order of the questions.

    Args:
        model: The base.
        edited_model: The base with one delta bound, plain or stacked, whose entries act within
            `depth`.
        questions: Questions, with the index of their edit.
        depth: Where the edits act first.
        evaluation_config: Scorers, generation and memory.

    Returns:
        One result per question.

    Raises:
        InvalidInputError: For a question that cannot be read, and for a base that computes NaN.
    """
    unique: dict[tuple, int] = {}
    query_numbers = [
        unique.setdefault(query_key(ask.query), len(unique)) for ask in questions
    ]  # A -> unique
    queries: list[Query] = [None] * len(unique)  # type: ignore[list-item]
    for ask, number in zip(questions, query_numbers):
        queries[number] = ask.query
    if evaluation_config.needs_all_positions:
        depth = depth._replace(scored_only=False)  # a thinned batch has no other positions
    results: list[ProbeResult | None] = [None] * len(questions)
    for batch in make_batches(model, queries, evaluation_config.memory_bytes):
        row_by_query = {number: row for row, number in enumerate(batch)}
        question_indices = [a for a, number in enumerate(query_numbers) if number in row_by_query]
        query_index = torch.tensor([row_by_query[query_numbers[a]] for a in question_indices])
        batch_results = _evaluate_batch(
            model,
            edited_model,
            [queries[n] for n in batch],
            [questions[a] for a in question_indices],
            query_index,
            depth,
            evaluation_config,
        )
        for a, one in zip(question_indices, batch_results):
            results[a] = one
    return [one for one in results if one is not None]


def _evaluate_batch(
    model: Model,
    edited_model: Model,
    queries: Sequence[Query],
    questions: Sequence[ProbeQuestion],
    query_index: Tensor,
    depth: EditDepth,
    evaluation_config: EvaluationConfig,
) -> list[ProbeResult]:
    """`index` [A]: which of the queries each ask is about."""
    inputs = model.preprocess(queries)
    source = prefix.run_prefix(model, inputs, depth)
    options = {
        "k": evaluation_config.num_ranks,
        "all_positions": evaluation_config.needs_all_positions,
    }
    known_logits = (
        model.prefix_cache.lookup_logits(inputs)
        if model.prefix_cache and model.prefix_cache.serves(model)
        else None
    )
    with section("base, per editor"):
        before = read_out(
            model,
            source,
            return_logits=True,
            known_logits=known_logits,
            scored_only=True,
            **options,
        )
    logits, before = before.logits, _to_cpu(before._replace(logits=None))
    check_finite(model, before)
    edit_index = torch.tensor([ask.edit_index for ask in questions])
    with section("edited answers"):
        after = _edited_readouts(
            edited_model,
            source,
            questions,
            query_index,
            edit_index,
            {**options, "base_logits": logits},
            evaluation_config.memory_bytes,
        )
    del logits
    with section("generation"):
        generations = _generate_answers(
            model, edited_model, queries, questions, query_index, edit_index, evaluation_config
        )
    base_readouts = _select_rows(before, query_index)
    assert after.kl is not None
    with section("generation"):
        ppl_ratios = _ppl_ratios(
            edited_model, questions, edit_index, len(queries), evaluation_config.ppl_r_tokens
        )
    with section("scoring"):
        return [
            ProbeResult(*found)
            for found in zip(
                _probe_answers(model, base_readouts, generations[0], questions),
                _probe_answers(model, after, generations[1], questions),
                _scores(questions, base_readouts, after, evaluation_config),
                map(_round_finite, after.kl.tolist()),
                _unchanged_generations(questions, *generations),
                ppl_ratios,
                strict=True,
            )
        ]


def _edited_readouts(
    edited_model: Model,
    source,
    questions: Sequence[ProbeQuestion],
    query_index: Tensor,
    edit_index: Tensor,
    options: dict,
    memory_bytes: int,
) -> Readout:
    """The edited models' readings, a few rows at a time."""
    if isinstance(source, Inputs):
        return _readouts_from_queries(
            edited_model,
            questions,
            query_index,
            edit_index,
            options,
            memory_bytes,
            source.labels.shape[1],
        )
    device = source.edit_index.device
    scored_only = all(
        prefix.can_decode_scored(edited_model.card, delta.header) for delta in edited_model.deltas
    )
    readouts = []
    for begin in range(0, len(questions), source.num_rows):
        span = slice(begin, begin + source.num_rows)
        row_index = query_index[span].to(device)
        batch_options = {**options, "base_logits": options["base_logits"][row_index]}
        batch = batches.take_rows(source, row_index)
        readouts.append(
            _to_cpu(
                read_out(
                    edited_model,
                    batch,
                    edit_index=edit_index[span].to(device),
                    scored_only=scored_only,
                    **batch_options,
                )
            )
        )
    return concat_readouts(readouts)


def _readouts_from_queries(
    edited_model: Model,
    questions: Sequence[ProbeQuestion],
    query_index: Tensor,
    edit_index: Tensor,
    options: dict,
    memory_bytes: int,
    num_scored: int,
) -> Readout:
    """Readings where edits act before the decoder: pixels have no row axis to take, so rows are
    read anew, as many as fit the budget; an edit may have made them much longer than the base's.
    """
    readouts, begin, size = [], 0, min(len(questions), MAX_ROWS)
    while begin < len(questions):
        span = slice(begin, begin + size)
        inputs = edited_model.preprocess(
            [ask.query for ask in questions[span]], edit_index=edit_index[span]
        )
        length = inputs.input_ids.shape[1]
        bytes_per_row = (
            row_num_bytes(edited_model, length)
            + 4 * inputs.labels.shape[1] * edited_model.card.vocab_size
        )
        max_rows = max(1, memory_bytes // bytes_per_row)
        if max_rows < len(inputs.input_ids):
            size = max_rows
            continue
        device = inputs.input_ids.device
        batch_options = {
            **options,
            "base_logits": options["base_logits"][query_index[span].to(device)],
        }
        readouts.append(
            _to_cpu(
                read_out(
                    edited_model, inputs, edit_index=edit_index[span].to(device), **batch_options
                )
            )
        )
        begin += size
    length = max(
        (part.all_top_ids.shape[1] for part in readouts if part.all_top_ids is not None), default=0
    )
    return concat_readouts([_pad_readout(part, num_scored, length) for part in readouts])


def _pad_readout(readout: Readout, num_scored: int, length: int) -> Readout:
    """A reading padded to so many scored positions, and so many tokens of a row."""
    num_missing = num_scored - readout.labels.shape[1]
    all_top_ids = readout.all_top_ids
    if all_top_ids is not None:
        all_top_ids = F.pad(all_top_ids, (0, 0, 0, length - all_top_ids.shape[1]), value=-1)
    return readout._replace(
        labels=F.pad(readout.labels, (0, num_missing), value=IGNORE_INDEX),
        top_ids=F.pad(readout.top_ids, (0, 0, 0, num_missing)),
        nll=F.pad(readout.nll, (0, num_missing)),
        all_top_ids=all_top_ids,
    )


def _generate_answers(
    model: Model,
    edited_model: Model,
    queries: Sequence[Query],
    questions: Sequence[ProbeQuestion],
    query_index: Tensor,
    edit_index: Tensor,
    evaluation_config: EvaluationConfig,
) -> tuple[list[str | None], list[str | None]]:
    """What both models say when they are left to talk, per ask: the base once per question."""
    max_new_tokens = evaluation_config.max_new_tokens
    before: list[str | None] = [None] * len(questions)
    after: list[str | None] = [None] * len(questions)
    all_probes = evaluation_config.generate_probes == "all"
    generated_indices = [
        a for a, ask in enumerate(questions) if all_probes or get_probe(ask.probe).kind == "success"
    ]
    if not (max_new_tokens and generated_indices):
        return before, after
    query_rows = sorted({int(query_index[a]) for a in generated_indices})
    base_texts = dict(
        zip(query_rows, _generate_base(model, [queries[r] for r in query_rows], max_new_tokens))
    )
    device = next(iter(model.params.values())).device
    for begin in range(0, len(generated_indices), len(queries)):
        chunk = generated_indices[begin : begin + len(queries)]
        chunk_queries = [questions[a].query for a in chunk]
        for a, text in zip(
            chunk,
            generate(
                edited_model, chunk_queries, max_new_tokens, edit_index=edit_index[chunk].to(device)
            ),
        ):
            before[a], after[a] = base_texts[int(query_index[a])], text
    return before, after


def _generate_base(model: Model, queries: Sequence[Query], max_new_tokens: int) -> list[str]:
    """What the base says; what it has said already is not asked again."""
    texts = (
        model.prefix_cache.generations
        if model.prefix_cache and model.prefix_cache.serves(model)
        else {}
    )
    if all(query_key(query) in texts for query in queries):
        return [texts[query_key(query)] for query in queries]
    return generate(model, queries, max_new_tokens)


def _unchanged_generations(
    questions: Sequence[ProbeQuestion], before: Sequence[str | None], after: Sequence[str | None]
) -> Iterator[bool | None]:
    for ask, one, two in zip(questions, before, after):
        if one is None or two is None or get_probe(ask.probe).kind != "locality":
            yield None
        else:
            yield matches_answer(two, first_line(one))


def _ppl_ratios(
    edited_model: Model,
    questions: Sequence[ProbeQuestion],
    edit_index: Tensor,
    batch_size: int,
    num_tokens: int,
) -> list[float | None]:
    """PPL_r of the asks that are edits."""
    results: list[float | None] = [None] * len(questions)
    edit_indices = [
        a for a, ask in enumerate(questions) if num_tokens and ask.probe == "reliability"
    ]
    for begin in range(0, len(edit_indices), batch_size):
        chunk = edit_indices[begin : begin + batch_size]
        ratios = perplexity_ratios(
            edited_model, [questions[a].query for a in chunk], num_tokens, edit_index[chunk]
        )
        for a, ratio in zip(chunk, ratios):
            results[a] = _round_finite(ratio)
    return results


def _scores(
    questions: Sequence[ProbeQuestion],
    base: Readout,
    after: Readout,
    evaluation_config: EvaluationConfig,
) -> list[dict]:
    scores: list[dict] = [{} for _ in questions]
    for name in dict.fromkeys(ask.probe for ask in questions):
        question_indices = [a for a, ask in enumerate(questions) if ask.probe == name]
        row_index = torch.tensor(question_indices)
        pair = _select_rows(base, row_index), _select_rows(after, row_index)
        for rule in evaluation_config.scorers:
            probe_score = score_probe(rule, name, *pair)
            edited_values = (
                probe_score.after if probe_score.agreement is None else probe_score.agreement
            )
            for a, one, two in zip(
                question_indices, probe_score.before.tolist(), edited_values.tolist()
            ):
                scores[a][rule.name] = (_round_finite(one), _round_finite(two))
    return scores


def _probe_answers(
    model: Model,
    readout: Readout,
    generations: Sequence[str | None],
    questions: Sequence[ProbeQuestion],
) -> Iterator[ProbeAnswer]:
    ids = readout.top_ids[..., 0]  # [A T]
    accuracy = token_accuracy(ids, readout.labels).tolist()
    exact = exact_match(ids, readout.labels).tolist()
    nll = mean_nll(readout.nll, readout.labels).tolist()
    for a, ask in enumerate(questions):
        text = model.detokenize(ids[a][readout.labels[a] != IGNORE_INDEX].tolist()).strip()
        answer = ProbeAnswer(
            text=text,
            accuracy=round(accuracy[a], 4),
            exact_match=exact[a] == 1,
            nll=_round_finite(nll[a]),
        )
        generation = generations[a]
        if generation is not None:
            generated_words = tokenize_words(generation)
            answer = ProbeAnswer(
                text=answer.text,
                accuracy=answer.accuracy,
                exact_match=answer.exact_match,
                nll=answer.nll,
                generation=first_line(generation),
                generation_match=matches_answer(generation, (ask.query.target, *ask.query.aliases)),
                ngram_entropy=_round_finite(ngram_entropy(generated_words))
                if len(generated_words) > 2
                else None,
            )
        yield answer


def _round_finite(value: float) -> float | None:
    return round(value, 4) + 0.0 if math.isfinite(value) else None


def _select_rows(readout: Readout, row_index: Tensor) -> Readout:
    return Readout(*(None if t is None else t[row_index] for t in readout))  # type: ignore[misc]


def _to_cpu(readout: Readout) -> Readout:
    return Readout(*(None if t is None else t.cpu() for t in readout))  # type: ignore[misc]
