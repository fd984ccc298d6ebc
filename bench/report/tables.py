"""Terminal, Markdown and LaTeX tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from errata.bench.report.summary import (
    EditorSummary,
    ProbeSummary,
    TableKey,
    sort_probes,
    summarize,
)
from errata.bench.storage.results_log import ResultRow
from errata.functional.errors import InvalidInputError
from errata.functional.metrics.bootstrap import Interval
from errata.functional.metrics.conventions import get_probe

__all__ = ["table"]

Style = Literal["terminal", "markdown", "latex"]


def table(rows: Iterable[ResultRow], style: Style = "terminal") -> str:
    """Every leg as a table: a base line, a line per editor, a column per probe, in percent.

    The terminal shows means, in at most 80 columns. Markdown and LaTeX print EM/Acc pairs for
    success probes, as MMEdit does, and half the interval's width.

    Args:
        rows: Result rows.
        style: `terminal`, `markdown` or `latex`.

    Returns:
        Text.

    Raises:
        InvalidInputError: For an unknown style or no rows.
    """
    if style not in _STYLES:
        raise InvalidInputError(
            f"a table's style must be one of {', '.join(_STYLES)}; got {style!r}."
        )
    tables = summarize(rows)
    if not tables:
        raise InvalidInputError("a table needs at least one row; the log has none.")
    return "\n\n".join(_STYLES[style](leg, lines) for leg, lines in tables.items())


def heading(key: TableKey, editors: Sequence[EditorSummary]) -> str:
    """The heading of a table.

    Args:
        key: Model, protocol, moment and scorer.
        editors: Its lines.

    Returns:
        One line.
    """
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


MAX_TERMINAL_WIDTH = 80


def _terminal_table(key: TableKey, editors: Sequence[EditorSummary]) -> str:
    """Means only, in blocks of columns that fit a terminal. The page has the intervals."""
    names = _probe_columns(editors)
    body: list[list[str]] = [["", *(get_probe(name).column for name in names)]]
    body.append(["unedited", *(_format_percent(_base_success(editors, name)) for name in names)])
    for line in editors:
        cells = [line.probes.get(name) for name in names]
        scores = (
            None if cell is None or cell.score.count == 0 else cell.score.mean for cell in cells
        )
        body.append([line.editor, *map(_format_percent, scores)])
        for label, field in (("exact match", "exact_match"), ("generation", "generation_match")):
            values = [cell and _mean_or_none(getattr(cell, field)) for cell in cells]
            if any(value is not None for value in values):
                marks = (_format_percent(v) if v is not None else "" for v in values)
                body.append([f"  {label}", *marks])
    return "\n".join([heading(key, editors), *_aligned_blocks(body)])


def _aligned_blocks(body: Sequence[Sequence[str]]) -> list[str]:
    """Align a grid. Columns that do not fit continue in another block below."""
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    blocks: list[list[int]] = [[]]
    used = widths[0]
    for column in range(1, len(widths)):
        if blocks[-1] and used + 2 + widths[column] > MAX_TERMINAL_WIDTH:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(column)
        used += 2 + widths[column]
    lines: list[str] = []
    for number, columns in enumerate(blocks):
        if number:
            lines.append("")
        for row in body:
            cells = [str(row[0]).ljust(widths[0])]
            cells += [str(row[i]).rjust(widths[i]) for i in columns]
            if any(row[i] for i in columns):
                lines.append("  ".join(cells).rstrip())
    return lines


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
            rf"\caption{{{heading(key, editors).translate(_LATEX_ESCAPES)}. {_NOTE.translate(_LATEX_ESCAPES)}}}",  # noqa: E501
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
