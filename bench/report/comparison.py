"""Runs side by side: where they differ, by how much, and whether that could be chance.

Two sides are compared on the cases both have, one value per case and probe. The p value is of a
sign-flip test (`functional.intervals.paired`), corrected over the probes of one comparison by
Holm's step-down procedure: one in twenty comparisons without any difference names a probe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from errata.bench.report.summary import TableKey, sort_probes
from errata.bench.storage.results_log import ResultRow
from errata.functional.errors import InvalidInputError
from errata.functional.metrics.bootstrap import PairedTest, paired_test
from errata.functional.metrics.conventions import get_probe

__all__ = ["Difference", "RunColumn", "columns", "compare", "table"]


class RunColumn(NamedTuple):
    """One column of a comparison: an editor on a model in one of the runs."""

    run: str
    model: str
    editor: str

    def label(self, others: Sequence[RunColumn]) -> str:
        """A label that distinguishes this column from others.

        Args:
            others: The other columns.

        Returns:
            The fields that differ, and the editor.
        """
        parts = [
            value
            for field, value in zip(self._fields, self)
            if len({getattr(one, field) for one in others}) > 1 or field == "editor"
        ]
        return " ".join(parts)


class Difference(msgspec.Struct, frozen=True):
    """One probe: the mean of each side over the cases both have, and what is between them."""

    probe: str
    first: float
    second: float
    test: PairedTest
    p: float  # corrected over the probes of this comparison


ProbeValues = Mapping[str, Mapping[str, float]]  # probe -> case -> value


def columns(
    runs: Mapping[str, Iterable[ResultRow]],
) -> dict[TableKey, dict[RunColumn, dict[str, dict[str, float]]]]:
    """Group rows of several runs; a case's value is the mean of its rows.

    Runs are compared under one protocol, moment, gap and scorer; the model may differ.

    Args:
        runs: Rows by run.

    Returns:
        Values by table, column, probe and case.
    """
    sums: dict[TableKey, dict[RunColumn, dict[str, dict[str, list[float]]]]] = {}
    for name, rows in runs.items():
        for row in rows:
            if row.score is None:
                continue
            gap = 0 if row.evaluated_at == "end" else row.gap
            key = TableKey("", row.protocol, row.evaluated_at, gap, row.scorer)
            column = RunColumn(name, row.model, row.editor)
            cases = sums.setdefault(key, {}).setdefault(column, {}).setdefault(row.probe, {})
            cases.setdefault(row.case, []).append(row.score)
    return {
        leg: {
            side: {
                name: {case: sum(found) / len(found) for case, found in cases.items()}
                for name, cases in probes.items()
            }
            for side, probes in there.items()
        }
        for leg, there in sums.items()
    }


def compare(first: ProbeValues, second: ProbeValues, seed: int = 0) -> list[Difference]:
    """Compare two columns on every probe and case that both have.

    Args:
        first: Values of the first.
        second: Values of the second.
        seed: Seed of the bootstrap.

    Returns:
        One difference per probe, p values corrected.

    Raises:
        InvalidInputError: If they share no case.
    """
    tests = []
    for name in sort_probes(set(first) & set(second)):
        shared = [case for case in first[name] if case in second[name]]
        if shared:
            a = torch.tensor([first[name][case] for case in shared])
            b = torch.tensor([second[name][case] for case in shared])
            tests.append((name, float(a.mean()), float(b.mean()), paired_test(a, b, seed=seed)))
    if not tests:
        raise InvalidInputError(
            "two runs must share at least one probe of one case; these share none."
        )
    corrected = holm_correction([last.p for *_, last in tests])
    return [Difference(name, a, b, gap, p) for (name, a, b, gap), p in zip(tests, corrected)]


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given.

    >>> holm_correction([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Args:
        p_values: P values.

    Returns:
        Corrected p values.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, running_max = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = running_max
    return corrected


def column_pairs(values_by_column: Mapping[RunColumn, Any]) -> list[tuple[RunColumn, RunColumn]]:
    """The pairs of columns to compare.

    An editor with itself across runs, else the first column with all others.

    Args:
        values_by_column: Columns.

    Returns:
        Pairs.
    """
    known = list(values_by_column)
    first = known[0]
    same = [
        (a, b)
        for i, a in enumerate(known)
        for b in known[i + 1 :]
        if a.editor == b.editor and a.run != b.run
    ]
    return same or [(first, other) for other in known[1:]]


def table(runs: Mapping[str, Iterable[ResultRow]]) -> str:
    """Every comparison as text: `*` p < 0.05, `**` p < 0.01, `***` p < 0.001, after correction.

    Args:
        runs: Rows by run.

    Returns:
        Text.

    Raises:
        InvalidInputError: For fewer than two columns, or two without a case in common.
    """
    grouped = columns(runs)
    blocks = []
    for leg, there in grouped.items():
        for one, two in column_pairs(there) if len(there) > 1 else ():
            blocks.append(_comparison_block(leg, one, two, compare(there[one], there[two])))
    if not blocks:
        raise InvalidInputError(
            "a comparison needs two editors or two runs under one protocol and scorer; got "
            f"{', '.join(runs)} with "
            f"{', '.join(sorted({side.editor for x in grouped.values() for side in x})) or 'none'}."
        )
    return "\n\n".join(blocks)


def _comparison_block(
    key: TableKey,
    first_column: RunColumn,
    second_column: RunColumn,
    differences: Sequence[Difference],
) -> str:
    first, second = (
        first_column.label([first_column, second_column]),
        second_column.label([first_column, second_column]),
    )
    when = "" if key.protocol == "single" else f", {key.evaluated_at} {key.gap or ''}".rstrip()
    counts = sorted({each.test.count for each in differences})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    head = f"{first}  →  {second}    {key.protocol}{when} · scorer {key.scorer} · {span} cases"
    body = [["", first, second, "difference", "95% interval", "p (Holm)", ""]]
    for each in differences:
        gap = each.test
        body.append(
            [
                get_probe(each.probe).title,
                f"{100 * each.first:.1f}",
                f"{100 * each.second:.1f}",
                f"{100 * gap.difference:+.1f}",
                f"[{100 * gap.low:+.1f} {100 * gap.high:+.1f}]",
                f"{each.p:.4f}",
                "*" * sum(each.p < level for level in (0.05, 0.01, 0.001)),
            ]
        )
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, 6) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in body
    ]
    return "\n".join([head, *lines])
