"""Ask a model and its edited selves the same questions, from a prefix computed once per row.

Equal questions are read once, run once up to the lowest edited place, and answered once by the
base; each edit that asks them goes on from there. Legend: B unique rows · A asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional import Inputs, Model, Query, prefix, rows
from errata.functional.answers import answers, join
from errata.functional.errors import BadInput, ErrataError
from errata.functional.generate import generate
from errata.functional.metrics import (
    Reading,
    Scorer,
    exact_match,
    mean_nll,
    probe,
    score,
    token_accuracy,
)
from errata.functional.prefix import Reach
from errata.functional.records import image_key
from errata.functional.types import IGNORE
from errata.functional.words import first_line, matches, ngram_entropy, tokens

from .clock import part
from .fluency import continued
from .ledger import Answer

__all__ = ["Ask", "Measured", "Terms", "batches", "check_finite", "key_of", "measure", "row_bytes"]

MOST_ROWS = 64  # read and embedded together, whatever the budget


class Ask(NamedTuple):
    """One question to one edit."""

    probe: str
    query: Query
    edit: int = 0  # number in the stacked delta; 0 where only one edit is bound


class Terms(NamedTuple):
    """How answers are measured."""

    scorers: tuple[Scorer, ...]
    generate: int = 0  # tokens of free generation; 0: none
    generate_for: Literal["every", "success"] = "every"  # probe, or all but localities
    ppl_r: int = 0  # tokens an edited model goes on for behind the edit's target; 0: no PPL_r
    budget: int = 1 << 30  # bytes a batch may take beside the model

    @property
    def ranks(self) -> int:
        return max(one.ranks for one in self.scorers)

    @property
    def everywhere(self) -> bool:
        return any(one.whole for one in self.scorers)


class Measured(NamedTuple):
    """What came of one ask: both answers, and (base success, score) by scorer name."""

    before: Answer
    after: Answer
    scores: dict[str, tuple[float | None, float | None]]
    kl: float | None = None  # KL(base || edited) at the answer, nats per token
    same: bool | None = None  # localities: both say the same when left to talk
    ppl_r: float | None = None  # of edits


def key_of(query: Query) -> tuple:
    """What makes two questions the same: words, target, and what the pictures show."""
    return query.prompt, query.target, tuple(map(image_key, query.images)), query.video


def measure(
    model: Model, bound: Model, asks: Sequence[Ask], reach: Reach, terms: Terms
) -> list[Measured]:
    """Answers of the base and of the edit each ask names, in the order of the asks.

    `bound` is `model` with one delta, plain or stacked, whose entries lie within `reach`. Raises
    BadInput for a question that can not be read and for a base that computes NaN.
    """
    unique: dict[tuple, int] = {}
    home = [unique.setdefault(key_of(ask.query), len(unique)) for ask in asks]  # A -> unique
    queries: list[Query] = [None] * len(unique)  # type: ignore[list-item]
    for ask, number in zip(asks, home):
        queries[number] = ask.query
    if terms.everywhere:
        reach = reach._replace(scored=False)  # a thinned batch has no other positions
    found: list[Measured | None] = [None] * len(asks)
    for batch in batches(model, queries, terms.budget):
        place = {number: row for row, number in enumerate(batch)}
        here = [a for a, number in enumerate(home) if number in place]
        index = torch.tensor([place[home[a]] for a in here])
        part = _measure_batch(
            model, bound, [queries[n] for n in batch], [asks[a] for a in here], index, reach, terms
        )
        for a, one in zip(here, part):
            found[a] = one
    return [one for one in found if one is not None]


def _measure_batch(
    model: Model,
    bound: Model,
    queries: Sequence[Query],
    asks: Sequence[Ask],
    index: Tensor,
    reach: Reach,
    terms: Terms,
) -> list[Measured]:
    """`index` [A]: which of the queries each ask is about."""
    inputs = model.read(queries)
    source = prefix.cut(model, inputs, reach)
    options = {"k": terms.ranks, "everywhere": terms.everywhere}
    given = model.known.said(inputs) if model.known and model.known.serves(model) else None
    with part("base, per editor"):
        before = answers(model, source, logits=True, given=given, narrow=True, **options)
    logits, before = before.logits, _on_cpu(before._replace(logits=None))
    check_finite(model, before)
    edit = torch.tensor([ask.edit for ask in asks])
    with part("edited answers"):
        after = _edited(bound, source, asks, index, edit, {**options, "base": logits}, terms.budget)
    del logits
    with part("generation"):
        said = _said(model, bound, queries, asks, index, edit, terms)
    base = _rows(before, index)
    assert after.kl is not None
    with part("generation"):
        ratios = _ratios(bound, asks, edit, len(queries), terms.ppl_r)
    with part("scoring"):
        return [
            Measured(*found)
            for found in zip(
                _answers(model, base, said[0], asks),
                _answers(model, after, said[1], asks),
                _scores(asks, base, after, terms),
                map(_number, after.kl.tolist()),
                _same(asks, *said),
                ratios,
                strict=True,
            )
        ]


def _edited(
    bound: Model,
    source,
    asks: Sequence[Ask],
    index: Tensor,
    edit: Tensor,
    options: dict,
    budget: int,
) -> Reading:
    """The edited models' readings, a few rows at a time."""
    if isinstance(source, Inputs):
        return _reread(bound, asks, index, edit, options, budget, source.labels.shape[1])
    device = source.edit.device
    few = all(prefix.narrows(bound.card, delta.header) for delta in bound.deltas)
    parts = []
    for begin in range(0, len(asks), source.rows):
        some = slice(begin, begin + source.rows)
        here = index[some].to(device)
        mine = {**options, "base": options["base"][here]}
        batch = rows.take(source, here)
        parts.append(_on_cpu(answers(bound, batch, edit=edit[some].to(device), narrow=few, **mine)))
    return join(parts)


def _reread(
    bound: Model,
    asks: Sequence[Ask],
    index: Tensor,
    edit: Tensor,
    options: dict,
    budget: int,
    scored: int,
) -> Reading:
    """Readings where edits act before the decoder: pixels have no row axis to take, so rows are
    read anew, as many as fit the budget; an edit may have made them much longer than the base's.
    """
    parts, begin, size = [], 0, min(len(asks), MOST_ROWS)
    while begin < len(asks):
        some = slice(begin, begin + size)
        inputs = bound.read([ask.query for ask in asks[some]], edit=edit[some])
        length = inputs.ids.shape[1]
        each = row_bytes(bound, length) + 4 * inputs.labels.shape[1] * bound.card.vocab
        fits = max(1, budget // each)
        if fits < len(inputs.ids):
            size = fits
            continue
        device = inputs.ids.device
        mine = {**options, "base": options["base"][index[some].to(device)]}
        parts.append(_on_cpu(answers(bound, inputs, edit=edit[some].to(device), **mine)))
        begin += size
    length = max((part.whole.shape[1] for part in parts if part.whole is not None), default=0)
    return join([_widened(part, scored, length) for part in parts])


def _widened(part: Reading, scored: int, length: int) -> Reading:
    """A reading padded to so many scored positions, and so many tokens of a row."""
    more = scored - part.labels.shape[1]
    whole = part.whole
    if whole is not None:
        whole = F.pad(whole, (0, 0, 0, length - whole.shape[1]), value=-1)
    return part._replace(
        labels=F.pad(part.labels, (0, more), value=IGNORE),
        top=F.pad(part.top, (0, 0, 0, more)),
        nll=F.pad(part.nll, (0, more)),
        whole=whole,
    )


def _said(
    model: Model,
    bound: Model,
    queries: Sequence[Query],
    asks: Sequence[Ask],
    index: Tensor,
    edit: Tensor,
    terms: Terms,
) -> tuple[list[str | None], list[str | None]]:
    """What both models say when they are left to talk, per ask: the base once per question."""
    tokens = terms.generate
    before: list[str | None] = [None] * len(asks)
    after: list[str | None] = [None] * len(asks)
    every = terms.generate_for == "every"
    wanted = [a for a, ask in enumerate(asks) if every or probe(ask.probe).kind == "success"]
    if not (tokens and wanted):
        return before, after
    rows_asked = sorted({int(index[a]) for a in wanted})
    said = dict(zip(rows_asked, _spoken(model, [queries[r] for r in rows_asked], tokens)))
    device = next(iter(model.params.values())).device
    for begin in range(0, len(wanted), len(queries)):
        some = wanted[begin : begin + len(queries)]
        asked = [asks[a].query for a in some]
        for a, text in zip(some, generate(bound, asked, tokens, edit=edit[some].to(device))):
            before[a], after[a] = said[int(index[a])], text
    return before, after


def _spoken(model: Model, queries: Sequence[Query], tokens: int) -> list[str]:
    """What the base says; what it has said already is not asked again."""
    texts = model.known.texts if model.known and model.known.serves(model) else {}
    if all(key_of(query) in texts for query in queries):
        return [texts[key_of(query)] for query in queries]
    return generate(model, queries, tokens)


def _same(
    asks: Sequence[Ask], before: Sequence[str | None], after: Sequence[str | None]
) -> Iterator[bool | None]:
    for ask, one, two in zip(asks, before, after):
        if one is None or two is None or probe(ask.probe).kind != "locality":
            yield None
        else:
            yield matches(two, first_line(one))


def _ratios(
    bound: Model, asks: Sequence[Ask], edit: Tensor, size: int, tokens: int
) -> list[float | None]:
    """PPL_r of the asks that are edits."""
    found: list[float | None] = [None] * len(asks)
    wanted = [a for a, ask in enumerate(asks) if tokens and ask.probe == "reliability"]
    for begin in range(0, len(wanted), size):
        some = wanted[begin : begin + size]
        ratios = continued(bound, [asks[a].query for a in some], tokens, edit[some])
        for a, ratio in zip(some, ratios):
            found[a] = _number(ratio)
    return found


def _scores(asks: Sequence[Ask], base: Reading, after: Reading, terms: Terms) -> list[dict]:
    found: list[dict] = [{} for _ in asks]
    for name in dict.fromkeys(ask.probe for ask in asks):
        here = [a for a, ask in enumerate(asks) if ask.probe == name]
        chosen = torch.tensor(here)
        pair = _rows(base, chosen), _rows(after, chosen)
        for rule in terms.scorers:
            got = score(rule, name, *pair)
            kept = got.after if got.agreement is None else got.agreement
            for a, one, two in zip(here, got.before.tolist(), kept.tolist()):
                found[a][rule.name] = (_number(one), _number(two))
    return found


def _answers(
    model: Model, found: Reading, said: Sequence[str | None], asks: Sequence[Ask]
) -> Iterator[Answer]:
    ids = found.top[..., 0]  # [A T]
    accuracy = token_accuracy(ids, found.labels).tolist()
    exact = exact_match(ids, found.labels).tolist()
    nll = mean_nll(found.nll, found.labels).tolist()
    for a, ask in enumerate(asks):
        text = model.write(ids[a][found.labels[a] != IGNORE].tolist()).strip()
        answer = Answer(
            text=text, accuracy=round(accuracy[a], 4), exact=exact[a] == 1, nll=_number(nll[a])
        )
        free = said[a]
        if free is not None:
            spoken = tokens(free)
            answer = Answer(
                text=answer.text, accuracy=answer.accuracy, exact=answer.exact, nll=answer.nll,
                said=first_line(free), match=matches(free, (ask.query.target, *ask.query.aliases)),
                entropy=_number(ngram_entropy(spoken)) if len(spoken) > 2 else None,
            )  # fmt: skip
        yield answer


def _number(value: float) -> float | None:
    return round(value, 4) + 0.0 if math.isfinite(value) else None


def _rows(found: Reading, index: Tensor) -> Reading:
    return Reading(*(None if t is None else t[index] for t in found))  # type: ignore[misc]


def _on_cpu(found: Reading) -> Reading:
    return Reading(*(None if t is None else t.cpu() for t in found))  # type: ignore[misc]


def check_finite(model: Model, found: Reading) -> None:
    """Raise BadInput, naming parameters, when the base model's own scores are not numbers."""
    if bool(found.nll.isfinite().all()):
        return
    broken = [n for n, t in model.params.items() if not bool(torch.isfinite(t).all())]
    where = f"{len(broken)} parameter(s) hold NaN or infinity, e.g. {broken[0]}" if broken else (
        f"its parameters are finite, so it overflows in {next(iter(model.params.values())).dtype}"
    )  # fmt: skip
    raise BadInput(
        f"a model must give finite scores, and {model.card.id} does not: {where}. "
        "Get the checkpoint again, or load it with another dtype."
    )


def row_bytes(model: Model, tokens: int) -> int:
    """What one row takes while it is decoded without gradients, roughly and from above.

    Sixteen values of model width per token (residual stream, attention, feed-forward), and two
    attention maps per head of some 64 channels.
    """
    card = model.card
    heads = max(1, card.width // 64)
    return 4 * (16 * tokens * card.width + 2 * heads * tokens * tokens)


def batches(model: Model, queries: Sequence[Query], budget: int) -> Iterator[list[int]]:
    """Numbers of the queries, alike in pictures and length, as many together as fit the budget."""
    groups: dict[tuple, list[int]] = {}
    for number, query in enumerate(queries):
        groups.setdefault((len(query.images), query.video), []).append(number)
    for numbers in groups.values():
        numbers.sort(key=lambda n: (-len(queries[n].prompt) - len(queries[n].target), n))
        longest, scored = _read_one(model, queries[numbers[0]])
        each = row_bytes(model, longest) + 4 * scored * model.card.vocab  # and the base's logits
        size = max(1, min(MOST_ROWS, budget // each))
        for begin in range(0, len(numbers), size):
            yield numbers[begin : begin + size]


def _read_one(model: Model, query: Query) -> tuple[int, int]:
    """Tokens of a question with its answer, and of the answer alone."""
    try:
        inputs = model.read([query])
        return inputs.ids.shape[1], inputs.labels.shape[1]
    except ErrataError as fault:
        raise type(fault)(f"{fault} (asked: {query.prompt[:60]!r})") from fault
