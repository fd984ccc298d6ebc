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
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from errata.functional.errors import BadInput
from errata.functional.intervals import Interval, interval
from errata.functional.metrics import PROBES, SCORERS, probe

from .ledger import Row

__all__ = [
    "Cell",
    "Leg",
    "Line",
    "by_case",
    "html",
    "ordered",
    "read_profile",
    "shares",
    "summarise",
    "summary",
    "table",
]

Style = Literal["terminal", "markdown", "latex"]


class Leg(NamedTuple):
    """What a table's numbers share."""

    model: str
    protocol: str
    moment: str
    gap: int
    scorer: str


class Cell(msgspec.Struct, frozen=True):
    """One probe of one editor: means with their intervals, None where nothing was had.

    All lie in 0..1 down to `said_before`.
    """

    score: Interval
    base: Interval | None
    exact: Interval | None = None
    said: Interval | None = None
    exact_before: Interval | None = None
    said_before: Interval | None = None
    kl: Interval | None = None  # nats per token
    ppl: Interval | None = None  # exp of the mean -log p of the target
    ppl_before: Interval | None = None
    ppl_r: Interval | None = None
    fluency: Interval | None = None  # papers print it times 100
    fluency_before: Interval | None = None


class Line(msgspec.Struct, frozen=True):
    """One editor under one leg."""

    editor: str
    cases: int
    cells: Mapping[str, Cell]


def ordered(names: Iterable[str]) -> list[str]:
    """Probe names in the order of the papers' tables; ones of your own come last."""
    rank = {name: place for place, name in enumerate(PROBES)}

    def place(name: str) -> tuple[int, str]:
        stems = [stem for stem in PROBES if name == stem or name.startswith(f"{stem}_")]
        return (rank[max(stems, key=len)] if stems else len(rank), name)

    return sorted(set(names), key=place)


def summarise(rows: Iterable[Row], draws: int = 1000) -> dict[Leg, list[Line]]:
    """Rows to lines: per leg, one line per editor, in the order in which the rows name them.

    The gaps of a sequential run after the last edit differ from case to case; at the moment "end"
    they are taken together.
    """
    grouped: dict[Leg, dict[str, dict[str, list[Row]]]] = {}
    for row in rows:
        gap = 0 if row.moment == "end" else row.gap
        leg = Leg(row.model, row.protocol, row.moment, gap, row.scorer)
        editors = grouped.setdefault(leg, {})
        editors.setdefault(row.editor, defaultdict(list))[_pooled(row)].append(row)
    return {
        leg: [_line(editor, probes, draws) for editor, probes in editors.items()]
        for leg, editors in grouped.items()
    }


def _pooled(row: Row) -> str:
    """A row's probe; scorers that pool a family's kinds over a case put them under one name."""
    if row.scorer in SCORERS and SCORERS[row.scorer].pooled:
        for stem in ("portability", "text_locality"):
            if row.probe.startswith(stem):
                return stem
    return row.probe


def _line(editor: str, probes: Mapping[str, Sequence[Row]], draws: int) -> Line:
    cells = {name: _cell(name, probes[name], draws) for name in ordered(probes)}
    return Line(editor, len({row.case for rows in probes.values() for row in rows}), cells)


def _cell(name: str, rows: Sequence[Row], draws: int) -> Cell:
    def mean(values: Iterable[tuple[str, float | bool | None]]) -> Interval | None:
        found = by_case(values)
        return interval(torch.tensor(found), draws=draws) if found else None

    score = interval(torch.tensor(by_case((r.case, r.score) for r in rows)), draws=draws)
    base = mean((r.case, r.base) for r in rows)
    kl = mean((r.case, r.kl) for r in rows)
    talk = {
        "fluency": mean((r.case, r.after.entropy) for r in rows),
        "fluency_before": mean((r.case, r.before.entropy) for r in rows),
    }
    if probe(name).kind == "locality":
        return Cell(score, base, said=mean((r.case, r.same) for r in rows), kl=kl, **talk)
    return Cell(
        score,
        base,
        exact=mean((r.case, r.after.exact) for r in rows),
        said=mean((r.case, r.after.match) for r in rows),
        exact_before=mean((r.case, r.before.exact) for r in rows),
        said_before=mean((r.case, r.before.match) for r in rows),
        kl=kl,
        ppl=_exp(mean((r.case, r.after.nll) for r in rows)),
        ppl_before=_exp(mean((r.case, r.before.nll) for r in rows)),
        ppl_r=mean((r.case, r.ppl_r) for r in rows),
        **talk,
    )


def _exp(nll: Interval | None) -> Interval | None:
    """Perplexity: of the mean, for a mean of perplexities is one case's."""
    if nll is None:
        return None
    mean, low, high = (math.exp(min(value, 700.0)) for value in nll[:3])
    return Interval(mean, low, high, nll.count)


def by_case(values: Iterable[tuple[str, float | bool | None]]) -> list[float]:
    """One value per case, the mean of its queries, in order of first sight; None is left out."""
    cases: dict[str, list[float]] = {}
    for case, value in values:
        if value is not None:
            cases.setdefault(case, []).append(float(value))
    return [sum(found) / len(found) for found in cases.values()]


def summary(rows: Iterable[Row]) -> dict[str, Any]:
    """The summary as plain JSON values: a list of legs, each with its editors and their cells."""
    return {
        "legs": [
            {
                **leg._asdict(),
                "editors": [
                    {
                        "editor": line.editor,
                        "cases": line.cases,
                        "probes": {name: _plain(cell) for name, cell in line.cells.items()},
                    }
                    for line in lines
                ],
            }
            for leg, lines in summarise(rows).items()
        ]
    }


def _plain(cell: Cell) -> dict[str, Any]:
    """An interval as an object; its mean is null where there was nothing to average."""
    plain = {}
    for name in cell.__struct_fields__:
        found = getattr(cell, name)
        if found is not None:
            nothing = dict.fromkeys(("mean", "low", "high")) if found.count == 0 else {}
            plain[name] = {**found._asdict(), **nothing}
    return plain


def table(rows: Iterable[Row], style: Style = "terminal") -> str:
    """Every leg as a table: a base line, a line per editor, a column per probe, values times 100.

    The terminal shows intervals; Markdown and LaTeX print EM/Acc pairs for success probes, as
    MMEdit does, and half the interval's width.

    Raises `BadInput` for an unknown style or no rows.
    """
    if style not in _STYLES:
        raise BadInput(f"a table's style must be one of {', '.join(_STYLES)}; got {style!r}.")
    legs = summarise(rows)
    if not legs:
        raise BadInput("a table needs at least one row; the ledger has none.")
    return "\n\n".join(_STYLES[style](leg, lines) for leg, lines in legs.items())


def html(
    rows: Iterable[Row],
    path: str | Path,
    *,
    folder: str | Path | None = None,
    settings: str = "",
    title: str = "",
) -> None:
    """Write the report page: one file that opens without a network.

    `folder` is the run's: its pictures, and what its units cost, come into the page. `settings` is
    the run's TOML text; it says which benchmark was asked, so that published numbers of the same
    setting stand beside ours. Raises OSError when the page can not be written.
    """
    from . import report_html

    report_html.write(list(rows), Path(path), Path(folder) if folder else None, settings, title)


def heading(leg: Leg, lines: Sequence[Line]) -> str:
    """What a table's numbers are of, in words."""
    moments = {
        "edit": "right after each edit",
        "gap": f"{leg.gap} edits later",
        "end": "after all edits",
        "length": f"after {leg.gap} edit{'s' * (leg.gap != 1)}, asked about these",
    }
    counts = sorted({line.cases for line in lines})
    cases = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    when = "" if leg.protocol == "single" else f", {moments.get(leg.moment, leg.moment)}"
    return f"{leg.model} · {leg.protocol}{when} · scorer {leg.scorer} · {cases} cases"


def _columns(lines: Sequence[Line]) -> list[str]:
    return ordered(name for line in lines for name in line.cells)


def _percent(value: float | None, places: int = 1) -> str:
    return "–" if value is None or value != value else f"{100 * value:.{places}f}"


def _base(lines: Sequence[Line], name: str) -> float | None:
    """The unedited model's success, 1 for a locality: it agrees with itself."""
    cells = [line.cells[name] for line in lines if name in line.cells]
    return 1.0 if probe(name).kind == "locality" else _mean(cells[0].base)


def _mean(value: Interval | None) -> float | None:
    return value and value.mean


def _terminal(leg: Leg, lines: Sequence[Line]) -> str:
    names = _columns(lines)
    body = [["", *(probe(name).short for name in names)]]
    body.append(["base", *(_percent(_base(lines, name)) for name in names)])
    for line in lines:
        cells = [line.cells.get(name) for name in names]
        body.append([line.editor, *(_ranged(cell) for cell in cells)])
        for label, field in (("exact", "exact"), ("said", "said")):
            values = [cell and _mean(getattr(cell, field)) for cell in cells]
            if any(value is not None for value in values):
                marks = (_percent(v) if v is not None else "" for v in values)
                body.append([f"  {label}", *marks])
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    text = [heading(leg, lines)]
    for row in body:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        text.append("  ".join([first, *rest]).rstrip())
    return "\n".join(text)


def _ranged(cell: Cell | None) -> str:
    if cell is None or cell.score.count == 0:
        return "–"
    mean, low, high, _ = cell.score
    return f"{_percent(mean)} [{_percent(low)} {_percent(high)}]"


def _paired(cell: Cell | None, plus: str) -> str:
    """`EM/Acc ± half width` of a success, `value ± half width` of a locality."""
    if cell is None or cell.score.count == 0:
        return "–"
    mean, low, high, _ = cell.score
    front = "" if cell.exact is None else f"{_percent(cell.exact.mean, 2)}/"
    return f"{front}{_percent(mean, 2)} {plus} {_percent((high - low) / 2)}"


def _grid(lines: Sequence[Line], plus: str) -> tuple[list[str], list[list[str]]]:
    names = _columns(lines)
    head = ["Method", *(probe(name).short for name in names)]
    base = ["Base"]
    for name in names:
        before = next((x.cells[name].exact_before for x in lines if name in x.cells), None)
        front = "" if before is None else f"{_percent(before.mean, 2)}/"
        base.append(f"{front}{_percent(_base(lines, name), 2)}")
    body = [[x.editor, *(_paired(x.cells.get(name), plus) for name in names)] for x in lines]
    return head, [base, *body]


def _markdown(leg: Leg, lines: Sequence[Line]) -> str:
    head, body = _grid(lines, "±")
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    text = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)
    return f"{heading(leg, lines)}\n\n{text}\n\n{_NOTE}"


_NOTE = "Values times 100; success probes as exact match/score; ± half a 95% interval over cases."
_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "±": r"$\pm$", "·": r"$\cdot$"}
)


def _latex(leg: Leg, lines: Sequence[Line]) -> str:
    head, body = _grid(lines, "±")
    rows = [" & ".join(cell.translate(_SPECIAL) for cell in row) + r" \\" for row in (head, *body)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{heading(leg, lines).translate(_SPECIAL)}. {_NOTE.translate(_SPECIAL)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


_STYLES = {"terminal": _terminal, "markdown": _markdown, "latex": _latex}


def read_profile(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Where a profiled run's time went, by leg: each stretch's seconds and share, longest first."""
    path = folder / "profile.json"
    if not path.is_file():
        return {}
    found = msgspec.json.decode(path.read_bytes())
    return {
        leg: {name: (one["seconds"], one["share"]) for name, one in about["parts"].items()}
        for leg, about in found.items()
    }


def shares(folder: Path) -> str:
    """The same as a table of text: a line per stretch, under its leg."""
    lines = []
    for leg, parts in read_profile(folder).items():
        lines.append(f"{leg}: {sum(spent for spent, _ in parts.values()):.1f} s")
        lines += [
            f"  {share:6.1%}  {spent:8.2f} s  {name}" for name, (spent, share) in parts.items()
        ]
    return "\n".join(lines)
