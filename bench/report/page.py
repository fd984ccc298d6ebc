"""The report of a run as one HTML page that needs no network: charts, numbers, every case.

The page carries the rows as columns of small numbers over one table of strings, and images as
data URIs, each once; the browser draws only what is on screen, so 10,000 rows stay light. What
would not fit is left out by whole cases, last first, and the page says how much.
"""

from __future__ import annotations

import base64
import html as markup
import io
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, UnidentifiedImageError

from errata.bench.data.benchmarks.table import BENCHMARKS, detect
from errata.bench.report.curves import compute_curves
from errata.bench.report.published import PublishedResult, matching_results
from errata.bench.report.summary import sort_probes, summary_json
from errata.bench.report.timing import read_profile
from errata.bench.storage.log_records import LegKey, UnitRecord, read_units
from errata.bench.storage.results_log import ResultRow
from errata.bench.storage.skips import read_skipped
from errata.functional.errors import InvalidInputError
from errata.functional.files import atomic_write
from errata.functional.metrics.conventions import SCORERS, get_probe

__all__ = ["render_page", "write_page"]

MAX_ROWS = 150_000
MAX_IMAGE_CHARS = 12_000_000  # characters of data URIs
MAX_IMAGE_SIDE = 192  # pixels of an image's longer side


ImageSource = Path | Mapping[str, Path]


def write_page(
    rows: Iterable[ResultRow],
    path: str | Path,
    *,
    folder: str | Path | None = None,
    settings: str = "",
    title: str = "",
) -> None:
    """Write the report page: one file that opens without a network.

    Args:
        rows: The rows of a run.
        path: The file to write, completely or not at all.
        folder: The run's folder, whose thumbnails and costs are shown.
        settings: The run's TOML text. It names the benchmark, so that published numbers of the same
            setting are shown.
        title: Heading of the page. Defaults to that of the settings.

    Raises:
        OSError: If the page cannot be written.
    """
    folder = Path(folder) if folder else None
    cases, benchmark, template = _describe_cases(settings)
    page = render_page(
        list(rows),
        folder and folder / "thumbnails",
        title=title or tomllib.loads(settings).get("title") or cases or "errata",
        setting=(benchmark, template),
        facts=([cases] if cases else []) + _skip_facts(folder) + _diverged_facts(rows),
        costs=_edit_costs(folder) if folder else [],
    )
    with atomic_write(Path(path)) as file:
        file.write(page.encode())


def _diverged_facts(rows: Iterable[ResultRow]) -> list[str]:
    cases = {(row.model, row.editor, row.case) for row in rows if row.fault}
    return [f"{len(cases)} edit(s) diverged: their answers are the base's"] if cases else []


def _skip_facts(folder: Path | None) -> list[str]:
    skipped = read_skipped(folder) if folder else {}
    return [f"{model}: {len(faults)} case(s) skipped" for model, faults in skipped.items()]


def _describe_cases(settings: str) -> tuple[str, str, str]:
    """What a run's settings say was asked, in words; the benchmark's name and the template's.

    No benchmark for a run that may have had other images than the benchmark's: its numbers are not
    to be compared with published ones.
    """
    cases = tomllib.loads(settings).get("cases", {})
    if cases.get("source") != "file":
        return ("micro world" if settings else ""), "", ""
    path, name = cases.get("path", ""), cases.get("benchmark", "")
    try:
        known = BENCHMARKS[name] if name else detect(path)
    except InvalidInputError:  # the file has gone since: the page can do without its name
        return Path(path).name, "", ""
    words = f"{known.title}, {Path(path).name}"
    stand_in = {"placeholder": "missing images drawn", "none": "missing images left out"}
    if how := stand_in.get(cases.get("missing_images", "error")):
        return f"{words}, {how}", "", ""
    return words, known.name, cases.get("template", "raw")


def _edit_costs(folder: Path) -> list[dict[str, Any]]:
    """Seconds per edit and most memory of each leg, from the run's units."""
    legs: dict[LegKey, list[UnitRecord]] = defaultdict(list)
    for record in read_units(folder):
        legs[record.leg].append(record)
    costs, profile = [], read_profile(folder)
    for leg, units in legs.items():
        edits = sum(unit.cases for unit in units)
        seconds = sum(unit.edit_seconds for unit in units)
        cost = msgspec.to_builtins(leg)
        peak = max(unit.peak_bytes for unit in units)
        if parts := profile.get(str(leg)):
            cost["where"] = ", ".join(f"{name} {share:.0%}" for name, (_, share) in parts.items())
        costs.append({**cost, "seconds": seconds / edits if edits else None, "peak": peak})
    return costs


def render_page(
    rows: Sequence[ResultRow],
    image_source: ImageSource | None = None,
    *,
    title: str = "errata",
    setting: tuple[str, str] = ("", ""),
    facts: Sequence[str] = (),
    costs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render the HTML report.

    Args:
        rows: Result rows.
        image_source: Folder of a run's images, or files by content id.
        title: Title of the page.
        setting: Benchmark and template, to show published numbers next to ours.
        facts: Lines about the run.
        costs: Seconds and bytes by leg.

    Returns:
        HTML.
    """
    data = {**_page_data(rows, image_source, setting, facts), "costs": list(costs)}
    parts = {
        "title": markup.escape(title),
        # "<" never appears as such inside the script element, whatever a dataset's text holds
        "data": msgspec.json.encode(data).decode().replace("<", "\\u003c"),
        "css": _read_asset("page.css"),
        "script": _read_asset("page.js"),
    }
    # in one pass: what stands in a place must not be looked at again
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read_asset("page.html"))


def _read_asset(name: str) -> str:
    return (
        resources.files("errata.bench.report").joinpath("assets", name).read_text(encoding="utf-8")
    )


class _ValueTable:
    """Values by number, in order of first sight."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self.numbers: dict[Any, int] = {value: i for i, value in enumerate(values)}

    def __getitem__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    @property
    def values(self) -> list[Any]:
        return list(self.numbers)


def _page_data(
    rows: Sequence[ResultRow],
    image_source: ImageSource | None,
    setting: tuple[str, str],
    facts: Sequence[str],
) -> dict[str, Any]:
    kept_rows, left_out = _limit_rows(rows)
    probes = sort_probes(row.probe for row in rows) + sorted(_pooled_probes(rows))
    probes = list(dict.fromkeys(probes))
    tables = {
        name: _ValueTable(dict.fromkeys(getattr(row, name) for row in rows))
        for name in ("model", "editor", "protocol", "evaluated_at", "scorer", "case")
    }
    columns, strings, images = _columns(kept_rows, tables, _ValueTable(probes))
    image_uris, missing = _embed_images(images.values, image_source)
    models = tables["model"].values
    return {
        "models": models,
        "editors": tables["editor"].values,
        "protocols": tables["protocol"].values,
        "evaluated_at_values": tables["evaluated_at"].values,
        "scorers": tables["scorer"].values,
        "cases": tables["case"].values,
        "probes": [{"key": name, **msgspec.to_builtins(get_probe(name))} for name in probes],
        "strings": strings.values,
        "images": image_uris,
        "rows": columns,
        "legs": _round_floats(summary_json(rows)["legs"]),
        "curves": compute_curves(rows),
        "published": [
            _published_json(one, model)
            for model in models
            for one in matching_results(*setting, model)
        ],
        "facts": list(facts),
        "footer": _footer(rows, left_out, missing),
    }


def _published_json(result: PublishedResult, model: str) -> dict[str, Any]:
    return {**msgspec.to_builtins(result), "here": model}


def _pooled_probes(rows: Sequence[ResultRow]) -> set[str]:
    """Columns that only a pooling scorer has."""
    pooling = {row.scorer for row in rows} & {n for n, rule in SCORERS.items() if rule.pools_kinds}
    stems = ("portability", "text_locality")
    return {s for s in stems for row in rows if pooling and row.probe.startswith(s)}


def _limit_rows(rows: Sequence[ResultRow]) -> tuple[list[ResultRow], int]:
    """Rows of as many whole cases as the page takes, and how many cases were left out."""
    if len(rows) <= MAX_ROWS:
        return list(rows), 0
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        sizes[row.case] += 1
    kept, total = set(), 0
    for case, size in sizes.items():
        total += size
        if kept and total > MAX_ROWS:
            break
        kept.add(case)
    return [row for row in rows if row.case in kept], len(sizes) - len(kept)


def _columns(
    rows: Sequence[ResultRow], tables: Mapping[str, _ValueTable], probes: _ValueTable
) -> tuple[dict[str, list[Any]], _ValueTable, _ValueTable]:
    """One entry per question and editor; the scorers' values of it stand in one list."""
    strings, images = _ValueTable([""]), _ValueTable()
    columns: dict[str, list[Any]] = defaultdict(list)
    places: dict[tuple[Any, ...], int] = {}
    num_scorers = len(tables["scorer"].values)
    for row in rows:
        key = (row.model, row.editor, row.protocol, row.evaluated_at, row.gap, row.seed, row.case)
        key = (*key, row.probe, row.index)
        place = places.setdefault(key, len(places))
        if place == len(columns["case"]):
            for name in ("model", "editor", "protocol", "evaluated_at", "case"):
                columns[name].append(tables[name][getattr(row, name)])
            for name in ("gap", "seed", "index"):
                columns[name].append(getattr(row, name))
            columns["probe"].append(probes[row.probe])
            columns["prompt"].append(strings[row.prompt])
            columns["target"].append(strings[row.target])
            columns["images"].append([images[name] for name in row.images])
            for letter, answer in (("b", row.before), ("a", row.after)):
                columns[f"{letter}text"].append(strings[answer.text])
                columns[f"{letter}exact"].append(int(answer.exact_match))
                said = -1 if answer.generation is None else strings[answer.generation]
                columns[f"{letter}said"].append(said)
            columns["scores"].append([None] * num_scorers)
        value = None if row.score is None else round(row.score * 10_000)
        columns["scores"][place][tables["scorer"][row.scorer]] = value
    return dict(columns), strings, images


def _round_floats(value: Any) -> Any:
    """Floats to five places: what a page needs, at a third of the size."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _round_floats(one) for key, one in value.items()}
    return [_round_floats(one) for one in value] if isinstance(value, list) else value


def _embed_images(
    names: Sequence[str], image_source: ImageSource | None
) -> tuple[list[str | None], int]:
    """Data URIs in the order of the names, None for one that is not kept or no longer fits."""
    uris: list[str | None] = []
    total = missing = 0
    for name in names:
        uri = _data_uri(_image_file(name, image_source))
        if uri is None or total + len(uri) > MAX_IMAGE_CHARS:
            missing += 1
            uris.append(None)
        else:
            total += len(uri)
            uris.append(uri)
    return uris, missing


def _image_file(name: str, image_source: ImageSource | None) -> Path | None:
    if isinstance(image_source, Mapping):
        return image_source.get(name)
    # a content name from a log must not lead out of the folder
    if image_source is None or Path(name).name != name:
        return None
    return image_source / f"{name}.png"


def _data_uri(file: Path | None) -> str | None:
    if file is None or not file.is_file():
        return None
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None  # a broken image is a missing one: the numbers do not hang on it
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    small = max(image.size) <= 96  # drawings of the micro world: PNG is smaller, and exact
    data = io.BytesIO()
    image.save(data, "PNG") if small else image.save(data, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _footer(rows: Sequence[ResultRow], left_out: int, missing: int) -> str:
    runs = ", ".join(sorted({row.run for row in rows}))
    versions = "; ".join(sorted({row.versions for row in rows}))
    words = [f"Run {runs}. {versions}. {len(rows):,} rows."]
    if left_out:
        words.append(f"{left_out:,} cases are in the numbers but too many for the list of cases.")
    if missing:
        words.append(f"{missing:,} images are not kept in this page.")
    return " ".join(words)
