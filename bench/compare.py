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

from errata.functional.errors import BadInput
from errata.functional.intervals import Paired, paired
from errata.functional.metrics import probe

from .ledger import Row
from .report import Leg, ordered

__all__ = ["Difference", "Side", "compare", "sides", "table"]


class Side(NamedTuple):
    """One column of a comparison: an editor on a model in one of the runs."""

    run: str
    model: str
    editor: str

    def words(self, others: Sequence[Side]) -> str:
        """What tells this side apart from the others."""
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
    paired: Paired
    p: float  # corrected over the probes of this comparison


Values = Mapping[str, Mapping[str, float]]  # probe -> case -> value


def sides(runs: Mapping[str, Iterable[Row]]) -> dict[Leg, dict[Side, dict[str, dict[str, float]]]]:
    """Rows of several runs, by leg, side, probe and case; a case's value is the mean of its rows.

    Runs are compared under one protocol, moment, gap and scorer; the model may differ.
    """
    sums: dict[Leg, dict[Side, dict[str, dict[str, list[float]]]]] = {}
    for name, rows in runs.items():
        for row in rows:
            if row.score is None:
                continue
            gap = 0 if row.moment == "end" else row.gap
            leg = Leg("", row.protocol, row.moment, gap, row.scorer)
            side = Side(name, row.model, row.editor)
            cases = sums.setdefault(leg, {}).setdefault(side, {}).setdefault(row.probe, {})
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


def compare(one: Values, two: Values, seed: int = 0) -> list[Difference]:
    """Compare two sides on every probe and case both have.

    Raises `BadInput` when they share none.
    """
    found = []
    for name in ordered(set(one) & set(two)):
        shared = [case for case in one[name] if case in two[name]]
        if shared:
            a = torch.tensor([one[name][case] for case in shared])
            b = torch.tensor([two[name][case] for case in shared])
            found.append((name, float(a.mean()), float(b.mean()), paired(a, b, seed=seed)))
    if not found:
        raise BadInput("two runs must share at least one probe of one case; these share none.")
    corrected = holm([last.p for *_, last in found])
    return [Difference(name, a, b, gap, p) for (name, a, b, gap), p in zip(found, corrected)]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = least
    return corrected


def pairs(there: Mapping[Side, Any]) -> list[tuple[Side, Side]]:
    """The first side against every other one, an editor against itself where runs share it."""
    known = list(there)
    first = known[0]
    same = [
        (a, b)
        for i, a in enumerate(known)
        for b in known[i + 1 :]
        if a.editor == b.editor and a.run != b.run
    ]
    return same or [(first, other) for other in known[1:]]


def table(runs: Mapping[str, Iterable[Row]]) -> str:
    """Every comparison as text: `*` p < 0.05, `**` p < 0.01, `***` p < 0.001, after correction.

    Raises `BadInput` when there are fewer than two sides, or two without a case in common.
    """
    grouped = sides(runs)
    blocks = []
    for leg, there in grouped.items():
        for one, two in pairs(there) if len(there) > 1 else ():
            blocks.append(_block(leg, one, two, compare(there[one], there[two])))
    if not blocks:
        raise BadInput(
            "a comparison needs two editors or two runs under one protocol and scorer; got "
            f"{', '.join(runs)} with "
            f"{', '.join(sorted({side.editor for x in grouped.values() for side in x})) or 'none'}."
        )
    return "\n\n".join(blocks)


def _block(leg: Leg, one: Side, two: Side, found: Sequence[Difference]) -> str:
    first, second = one.words([one, two]), two.words([one, two])
    when = "" if leg.protocol == "single" else f", {leg.moment} {leg.gap or ''}".rstrip()
    counts = sorted({each.paired.count for each in found})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    head = f"{first}  →  {second}    {leg.protocol}{when} · scorer {leg.scorer} · {span} cases"
    body = [["", first, second, "difference", "95% interval", "p (Holm)", ""]]
    for each in found:
        gap = each.paired
        body.append(
            [
                probe(each.probe).title,
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
