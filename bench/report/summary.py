"""A run's rows as numbers people can quote: summary, JSON, and tables in the papers' layout.

A value is a mean over cases of the mean over a case's queries (and seeds), with a bootstrap
interval over cases. A probe that was not asked has no cell. Every table says its model, protocol,
moment and scorer, for no number means anything without them.

    success probes    success after the edit under the scorer; "exact" and "said" stand beside it:
                      all target tokens right under teacher forcing, and normalised exact match of
                      a free generation
    locality probes   agreement of the edited model with the base one; "said": of what they say when
                      they are left to talk, normalised

JSON and page also have KL(base || edited) at the answer, the target's perplexity, PPL_r, and
fluency (n-gram entropy of what is said), where the rows hold what these are made of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from errata.bench.storage.results_log import ResultRow
from errata.functional.metrics.bootstrap import Interval, bootstrap_interval
from errata.functional.metrics.conventions import PROBES, SCORERS, get_probe

__all__ = [
    "EditorSummary",
    "ProbeSummary",
    "TableKey",
    "mean_per_case",
    "sort_probes",
    "summarize",
    "summary_json",
]


class TableKey(NamedTuple):
    """What a table's numbers share."""

    model: str
    protocol: str
    evaluated_at: str
    gap: int
    scorer: str


class ProbeSummary(msgspec.Struct, frozen=True):
    """One probe of one editor: means with their intervals, None where nothing was had.

    All lie in 0..1 down to `said_before`.
    """

    score: Interval
    base: Interval | None
    exact_match: Interval | None = None
    generation_match: Interval | None = None
    exact_match_before: Interval | None = None
    generation_match_before: Interval | None = None
    kl: Interval | None = None  # nats per token
    ppl: Interval | None = None  # exp of the mean -log p of the target
    ppl_before: Interval | None = None
    ppl_r: Interval | None = None
    fluency: Interval | None = None  # papers print it times 100
    fluency_before: Interval | None = None


class EditorSummary(msgspec.Struct, frozen=True):
    """One editor under one leg."""

    editor: str
    cases: int
    probes: Mapping[str, ProbeSummary]


def sort_probes(names: Iterable[str]) -> list[str]:
    """Sort probe names in the order of the papers' tables; your own come last.

    Args:
        names: Names.

    Returns:
        Sorted names.
    """
    rank = {name: place for place, name in enumerate(PROBES)}

    def place(name: str) -> tuple[int, str]:
        stems = [stem for stem in PROBES if name == stem or name.startswith(f"{stem}_")]
        return (rank[max(stems, key=len)] if stems else len(rank), name)

    return sorted(set(names), key=place)


def summarize(rows: Iterable[ResultRow], draws: int = 1000) -> dict[TableKey, list[EditorSummary]]:
    """Summarise rows: one line per editor in each table, in order of appearance.

    The gaps of a sequential run after the last edit differ from case to case; at "end" they are
    pooled.

    Args:
        rows: Result rows.
        draws: Resamples of the bootstrap.

    Returns:
        Lines by table.
    """
    grouped: dict[TableKey, dict[str, dict[str, list[ResultRow]]]] = {}
    for row in rows:
        gap = 0 if row.evaluated_at == "end" else row.gap
        key = TableKey(row.model, row.protocol, row.evaluated_at, gap, row.scorer)
        editors = grouped.setdefault(key, {})
        editors.setdefault(row.editor, defaultdict(list))[_pooled_probe(row)].append(row)
    return {
        leg: [_summarize_editor(editor, probes, draws) for editor, probes in editors.items()]
        for leg, editors in grouped.items()
    }


def _pooled_probe(row: ResultRow) -> str:
    """A row's probe; scorers that pool a family's kinds over a case put them under one name."""
    if row.scorer in SCORERS and SCORERS[row.scorer].pools_kinds:
        for stem in ("portability", "text_locality"):
            if row.probe.startswith(stem):
                return stem
    return row.probe


def _summarize_editor(
    editor: str, probes: Mapping[str, Sequence[ResultRow]], draws: int
) -> EditorSummary:
    cells = {name: _summarize_probe(name, probes[name], draws) for name in sort_probes(probes)}
    return EditorSummary(editor, len({row.case for rows in probes.values() for row in rows}), cells)


def _summarize_probe(name: str, rows: Sequence[ResultRow], draws: int) -> ProbeSummary:
    def mean(values: Iterable[tuple[str, float | bool | None]]) -> Interval | None:
        found = mean_per_case(values)
        return bootstrap_interval(torch.tensor(found), draws=draws) if found else None

    score = bootstrap_interval(
        torch.tensor(mean_per_case((r.case, r.score) for r in rows)), draws=draws
    )
    base = mean((r.case, r.base) for r in rows)
    kl = mean((r.case, r.kl) for r in rows)
    fluency = {
        "fluency": mean((r.case, r.after.ngram_entropy) for r in rows),
        "fluency_before": mean((r.case, r.before.ngram_entropy) for r in rows),
    }
    if get_probe(name).kind == "locality":
        return ProbeSummary(
            score,
            base,
            generation_match=mean((r.case, r.generation_unchanged) for r in rows),
            kl=kl,
            **fluency,
        )
    return ProbeSummary(
        score,
        base,
        exact_match=mean((r.case, r.after.exact_match) for r in rows),
        generation_match=mean((r.case, r.after.generation_match) for r in rows),
        exact_match_before=mean((r.case, r.before.exact_match) for r in rows),
        generation_match_before=mean((r.case, r.before.generation_match) for r in rows),
        kl=kl,
        ppl=_perplexity(mean((r.case, r.after.nll) for r in rows)),
        ppl_before=_perplexity(mean((r.case, r.before.nll) for r in rows)),
        ppl_r=mean((r.case, r.ppl_r) for r in rows),
        **fluency,
    )


def _perplexity(nll: Interval | None) -> Interval | None:
    """Perplexity: of the mean, for a mean of perplexities is one case's."""
    if nll is None:
        return None
    mean, low, high = (math.exp(min(value, 700.0)) for value in nll[:3])
    return Interval(mean, low, high, nll.count)


def mean_per_case(values: Iterable[tuple[str, float | bool | None]]) -> list[float]:
    """One value per case: the mean of its queries.

    Args:
        values: (case, value) pairs; None is left out.

    Returns:
        Means, in order of appearance.
    """
    values_by_case: dict[str, list[float]] = {}
    for case, value in values:
        if value is not None:
            values_by_case.setdefault(case, []).append(float(value))
    return [sum(found) / len(found) for found in values_by_case.values()]


def summary_json(rows: Iterable[ResultRow]) -> dict[str, Any]:
    """The summary as plain JSON values: a list of legs, each with its editors and cells.

    Args:
        rows: Result rows.

    Returns:
        JSON values.
    """
    return {
        "legs": [
            {
                **leg._asdict(),
                "editors": [
                    {
                        "editor": line.editor,
                        "cases": line.cases,
                        "probes": {name: _probe_json(cell) for name, cell in line.probes.items()},
                    }
                    for line in lines
                ],
            }
            for leg, lines in summarize(rows).items()
        ]
    }


def _probe_json(summary: ProbeSummary) -> dict[str, Any]:
    """An interval as an object; its mean is null where there was nothing to average."""
    plain = {}
    for name in summary.__struct_fields__:
        found = getattr(summary, name)
        if found is not None:
            empty = dict.fromkeys(("mean", "low", "high")) if found.count == 0 else {}
            plain[name] = {**found._asdict(), **empty}
    return plain
