"""Scores over the length of a sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from errata.bench.report.summary import mean_per_case
from errata.bench.storage.results_log import ResultRow
from errata.functional.metrics.bootstrap import bootstrap_interval
from errata.functional.metrics.conventions import get_probe

__all__ = ["compute_curves"]

_NUM_BINS = 10


# ------------------------------------------------------------------ lives of edits
_PROBE_FAMILIES = {
    "reliability": ("reliability", "text_reliability", "image_reliability"),
    "generality": ("rephrase", "image_rephrase"),
}


def _probe_family(name: str) -> str | None:
    for family, names in _PROBE_FAMILIES.items():
        if name in names:
            return family
    if name.startswith("portability"):
        return "portability"
    return "locality" if get_probe(name).kind == "locality" else None


def compute_curves(rows: Iterable[ResultRow]) -> list[dict[str, Any]]:
    """How scores change in sequential editing: by the position of an edit, and by its age.

        position   evaluated right after the edit, against the number of edits made by then
        age        against the number of edits made since (0: right after)
        length     edits evaluated after so many of them, against that number (protocol "lifelong")

    More than ten abscissae are put into ten bins, each at its mean.

    Args:
        rows: Result rows.

    Returns:
        Points (edits, mean, low, high, cases) per model, editor, scorer and family of probes.
    """
    rows = [row for row in rows if row.protocol != "single" and _probe_family(row.probe)]
    groups = _group_sizes(rows)
    points_by_key: dict[tuple[str, ...], list[tuple[int, ResultRow]]] = defaultdict(list)
    for row in rows:
        key = (row.model, row.editor, row.protocol, row.scorer, str(_probe_family(row.probe)))
        points_by_key[*key, "length" if row.evaluated_at == "after_length" else "age"].append(
            (row.gap, row)
        )
        if row.evaluated_at == "after_edit":
            size = groups.get((row.model, row.protocol), 0)
            points_by_key[*key, "position"].append(
                (row.case_number % size + 1 if size else row.case_number + 1, row)
            )
    names = ("model", "editor", "protocol", "scorer", "family", "axis")
    curves_json = []
    for key, points in points_by_key.items():
        binned = _bin_points(points)
        if len(binned) > 1 or key[-1] == "length":
            curves_json.append({**dict(zip(names, key)), "points": binned})
    return curves_json


def _group_sizes(rows: Iterable[ResultRow]) -> dict[tuple[str, str], int]:
    """Edits in a row before the base is back: the first of a group is asked that many later."""
    sizes: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.evaluated_at == "end":
            key = (row.model, row.protocol)
            sizes[key] = max(sizes.get(key, 0), row.gap + 1)
    return sizes


def _bin_points(points: Sequence[tuple[int, ResultRow]]) -> list[list[float]]:
    xs = sorted({x for x, _ in points})
    is_binned = len(xs) > _NUM_BINS
    bin_of = {x: i * _NUM_BINS // len(xs) if is_binned else i for i, x in enumerate(xs)}
    bins: dict[int, list[tuple[int, ResultRow]]] = defaultdict(list)
    for x, row in points:
        bins[bin_of[x]].append((x, row))
    binned = []
    for _, inside in sorted(bins.items()):
        values = mean_per_case((f"{row.case} {row.gap}", row.score) for _, row in inside)
        if not values:
            continue
        mean, low, high, count = bootstrap_interval(torch.tensor(values), draws=400)
        at = round(sum(x for x, _ in inside) / len(inside))
        binned.append([at, round(mean, 4), round(low, 4), round(high, 4), count])
    return binned
