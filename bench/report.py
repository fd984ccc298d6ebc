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

from errata.functional.errors import InvalidInputError
from errata.functional.intervals import Interval, bootstrap_interval
from errata.functional.metrics import PROBES, SCORERS, get_probe

from .ledger import ResultRow

__all__ = [
    "ProbeSummary",
    "TableKey",
    "EditorSummary",
    "mean_per_case",
    "write_page",
    "sort_probes",
    "read_profile",
    "timing_table",
    "summarize",
    "summary_json",
    "table",
]

Style = Literal["terminal", "markdown", "latex"]


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
    """Probe names in the order of the papers' tables; ones of your own come last."""
    rank = {name: place for place, name in enumerate(PROBES)}

    def place(name: str) -> tuple[int, str]:
        stems = [stem for stem in PROBES if name == stem or name.startswith(f"{stem}_")]
        return (rank[max(stems, key=len)] if stems else len(rank), name)

    return sorted(set(names), key=place)


def summarize(rows: Iterable[ResultRow], draws: int = 1000) -> dict[TableKey, list[EditorSummary]]:
    """Rows to lines: per leg, one line per editor, in the order in which the rows name them.

    The gaps of a sequential run after the last edit differ from case to case; at the moment "end"
    they are taken together.
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
    """One value per case, the mean of its queries, in order of first sight; None is left out."""
    values_by_case: dict[str, list[float]] = {}
    for case, value in values:
        if value is not None:
            values_by_case.setdefault(case, []).append(float(value))
    return [sum(found) / len(found) for found in values_by_case.values()]


def summary_json(rows: Iterable[ResultRow]) -> dict[str, Any]:
    """The summary as plain JSON values: a list of legs, each with its editors and their cells."""
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


def table(rows: Iterable[ResultRow], style: Style = "terminal") -> str:
    """Every leg as a table: a base line, a line per editor, a column per probe, values times 100.

    The terminal shows intervals; Markdown and LaTeX print EM/Acc pairs for success probes, as
    MMEdit does, and half the interval's width.

    Raises `BadInput` for an unknown style or no rows.
    """
    if style not in _STYLES:
        raise InvalidInputError(
            f"a table's style must be one of {', '.join(_STYLES)}; got {style!r}."
        )
    tables = summarize(rows)
    if not tables:
        raise InvalidInputError("a table needs at least one row; the ledger has none.")
    return "\n\n".join(_STYLES[style](leg, lines) for leg, lines in tables.items())


def write_page(
    rows: Iterable[ResultRow],
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


def heading(key: TableKey, editors: Sequence[EditorSummary]) -> str:
    """What a table's numbers are of, in words."""
    evaluated_at_words = {
        "after_edit": "right after each edit",
        "after_gap": f"{key.gap} edits later",
        "end": "after all edits",
        "after_length": f"after {key.gap} edit{'s' * (key.gap != 1)}, asked about these",
    }
    counts = sorted({line.cases for line in editors})
    cases = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    when = (
        ""
        if key.protocol == "single"
        else f", {evaluated_at_words.get(key.evaluated_at, key.evaluated_at)}"
    )
    return f"{key.model} · {key.protocol}{when} · scorer {key.scorer} · {cases} cases"


def _probe_columns(editors: Sequence[EditorSummary]) -> list[str]:
    return sort_probes(name for line in editors for name in line.probes)


def _format_percent(value: float | None, places: int = 1) -> str:
    return "–" if value is None or value != value else f"{100 * value:.{places}f}"


def _base_success(editors: Sequence[EditorSummary], name: str) -> float | None:
    """The unedited model's success, 1 for a locality: it agrees with itself."""
    cells = [line.probes[name] for line in editors if name in line.probes]
    return 1.0 if get_probe(name).kind == "locality" else _mean_or_none(cells[0].base)


def _mean_or_none(value: Interval | None) -> float | None:
    return value and value.mean


def _terminal_table(key: TableKey, editors: Sequence[EditorSummary]) -> str:
    names = _probe_columns(editors)
    body = [["", *(get_probe(name).column for name in names)]]
    body.append(["base", *(_format_percent(_base_success(editors, name)) for name in names)])
    for line in editors:
        cells = [line.probes.get(name) for name in names]
        body.append([line.editor, *(_format_interval(cell) for cell in cells)])
        for label, field in (("exact", "exact_match"), ("said", "generation_match")):
            values = [cell and _mean_or_none(getattr(cell, field)) for cell in cells]
            if any(value is not None for value in values):
                marks = (_format_percent(v) if v is not None else "" for v in values)
                body.append([f"  {label}", *marks])
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    text = [heading(key, editors)]
    for row in body:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        text.append("  ".join([first, *rest]).rstrip())
    return "\n".join(text)


def _format_interval(summary: ProbeSummary | None) -> str:
    if summary is None or summary.score.count == 0:
        return "–"
    mean, low, high, _ = summary.score
    return f"{_format_percent(mean)} [{_format_percent(low)} {_format_percent(high)}]"


def _format_pair(summary: ProbeSummary | None, plus: str) -> str:
    """`EM/Acc ± half width` of a success, `value ± half width` of a locality."""
    if summary is None or summary.score.count == 0:
        return "–"
    mean, low, high, _ = summary.score
    front = (
        "" if summary.exact_match is None else f"{_format_percent(summary.exact_match.mean, 2)}/"
    )
    return f"{front}{_format_percent(mean, 2)} {plus} {_format_percent((high - low) / 2)}"


def _table_grid(editors: Sequence[EditorSummary], plus: str) -> tuple[list[str], list[list[str]]]:
    names = _probe_columns(editors)
    head = ["Method", *(get_probe(name).column for name in names)]
    base = ["Base"]
    for name in names:
        before = next(
            (x.probes[name].exact_match_before for x in editors if name in x.probes), None
        )
        front = "" if before is None else f"{_format_percent(before.mean, 2)}/"
        base.append(f"{front}{_format_percent(_base_success(editors, name), 2)}")
    body = [
        [x.editor, *(_format_pair(x.probes.get(name), plus) for name in names)] for x in editors
    ]
    return head, [base, *body]


def _markdown_table(key: TableKey, editors: Sequence[EditorSummary]) -> str:
    head, body = _table_grid(editors, "±")
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    text = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)
    return f"{heading(key, editors)}\n\n{text}\n\n{_NOTE}"


_NOTE = "Values times 100; success probes as exact match/score; ± half a 95% interval over cases."
_LATEX_ESCAPES = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "±": r"$\pm$", "·": r"$\cdot$"}
)


def _latex_table(key: TableKey, editors: Sequence[EditorSummary]) -> str:
    head, body = _table_grid(editors, "±")
    rows = [
        " & ".join(cell.translate(_LATEX_ESCAPES) for cell in row) + r" \\" for row in (head, *body)
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{heading(key, editors).translate(_LATEX_ESCAPES)}. {_NOTE.translate(_LATEX_ESCAPES)}}}",
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


_STYLES = {"terminal": _terminal_table, "markdown": _markdown_table, "latex": _latex_table}


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


def timing_table(folder: Path) -> str:
    """The same as a table of text: a line per stretch, under its leg."""
    lines = []
    for leg, parts in read_profile(folder).items():
        lines.append(f"{leg}: {sum(spent for spent, _ in parts.values()):.1f} s")
        lines += [
            f"  {share:6.1%}  {spent:8.2f} s  {name}" for name, (spent, share) in parts.items()
        ]
    return "\n".join(lines)
