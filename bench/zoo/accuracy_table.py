"""The accuracies of the shipped models as a Markdown table, from their reports."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from errata.bench.zoo.evaluation import EDITED_KINDS

START, STOP = "<!-- accuracies -->", "<!-- end of accuracies -->"
HELD_OUT_SUFFIX = " (held-out questions)"
GROUPS: dict[str, tuple[str, ...]] = {
    "names": ("name",),
    "homes": ("home",),
    "foods": ("food",),
    "keepers": ("keeper",),
    "second hops taught": ("land", "job", "food_kind"),
    "attributes": ("color", "accent", "shape", "pattern", "ears"),
}
OTHER: dict[str, tuple[str, ...]] = {
    "sounds": ("sound",),
    "city and land in one answer": ("chain",),
    "second hops never taught": tuple(
        f"{r} (composed, never taught)" for r in ("land", "job", "food_kind")
    ),
    "facts stated in the context": ("in context: stated fact",),
    "digits": ("digit",),
    "counts": ("count",),
    "color and kind of shapes": ("scene_color", "scene_shape"),
    "photographs": ("photo",),
    "text: facts by name": tuple(f"text: named_{r}" for r in ("home", "food", "keeper", "sound")),
    "text: second hops": ("text: land", "text: job", "text: food_kind"),
    "text: general knowledge": tuple(
        f"text: {k}" for k in ("capital", "symbol", "opposite", "baby")
    ),
}


def accuracy_table(weights: Path) -> str:
    """Exact match in percent: one column per model, one row per group of questions.

    Args:
        weights: Folder of the models.

    Returns:
        Markdown.
    """
    paths = sorted(weights.glob("*/report.json"))
    reports = {path.parent.name: json.loads(path.read_text()) for path in paths}
    match: dict[str, Mapping[str, float]] = {n: r["exact_match"] for n, r in reports.items()}

    def line(title: str, cells: list[Any]) -> str:
        return f"| {title} | " + " | ".join(str(cell) for cell in cells) + " |"

    def percent(kinds: tuple[str, ...], suffix: str = "") -> list[str]:
        return [f"{100 * fmean(m[k + suffix] for k in kinds):.1f}" for m in match.values()]

    rows = [line("exact match, %", list(match)), line("---", ["---:"] * len(match))]
    rows += [line(title, percent(kinds)) for title, kinds in GROUPS.items()]
    rows.append(line("**mean of the 12 kinds edited**", percent(EDITED_KINDS)))
    rows.append(line("the same, held-out questions", percent(EDITED_KINDS, HELD_OUT_SUFFIX)))
    rows += [line(title, percent(kinds)) for title, kinds in OTHER.items()]
    rows.append(line("names, by `generate`", percent(("generated (names)",))))
    rows.append(line("parameters", [f"{r['parameters']:,}" for r in reports.values()]))
    seconds = [f"{r['cpu_seconds']:,.0f}" for r in reports.values()]
    rows.append(line("CPU-seconds to train, 1 thread", seconds))
    return "\n".join(rows)


def update_readme(readme: Path, weights: Path) -> None:
    """Put the table between its markers in a README.

    Args:
        readme: The file.
        weights: Folder of the models.
    """
    text = readme.read_text("utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(STOP)
    readme.write_text(f"{before}{START}\n{accuracy_table(weights)}\n{STOP}{after}", "utf-8")
