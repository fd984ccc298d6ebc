"""The report of a run as one HTML page that needs no network: charts, numbers, every case.

The page carries the rows as columns of small numbers over one table of strings, and pictures as
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
import torch
from PIL import Image, UnidentifiedImageError

from errata.functional.atomic import whole_file
from errata.functional.errors import BadInput
from errata.functional.intervals import interval
from errata.functional.metrics import SCORERS, probe

from .data import BENCHMARKS, detect
from .ledger import PROGRESS, Row, Unit
from .published import Quoted, here
from .report import by_case, ordered, read_profile, summary

__all__ = ["curves", "page", "write"]

MOST_ROWS = 150_000
MOST_PICTURES = 12_000_000  # characters of data URIs
SIDE = 192  # pixels of a picture's longer side
_BINS = 10

Pictures = Path | Mapping[str, Path]


def write(rows: Sequence[Row], path: Path, folder: Path | None, settings: str, title: str) -> None:
    """Write the page of a run's rows, whole or not at all; see `report.html`."""
    asked, benchmark, template = _cases(settings)
    whole = page(
        rows,
        folder and folder / "pictures",
        title=title or tomllib.loads(settings).get("title") or asked or "errata",
        setting=(benchmark, template),
        facts=[asked] if asked else [],
        costs=_costs(folder) if folder else [],
    )
    with whole_file(path) as file:
        file.write(whole.encode())


def _cases(settings: str) -> tuple[str, str, str]:
    """What a run's settings say was asked, in words; the benchmark's name and the template's.

    No benchmark for a run that may have had other images than the benchmark's: its numbers are not
    to be put beside published ones.
    """
    cases = tomllib.loads(settings).get("cases", {})
    if cases.get("source") != "file":
        return ("micro world" if settings else ""), "", ""
    path, name = cases.get("path", ""), cases.get("benchmark", "")
    try:
        known = BENCHMARKS[name] if name else detect(path)
    except BadInput:  # the file has gone since: the page can do without its name
        return Path(path).name, "", ""
    words = f"{known.title}, {Path(path).name}"
    stand_in = {"draw": "missing images drawn", "none": "missing images left out"}
    if how := stand_in.get(cases.get("on_missing", "error")):
        return f"{words}, {how}", "", ""
    return words, known.name, cases.get("template", "raw")


def _costs(folder: Path) -> list[dict[str, Any]]:
    """Seconds per edit and most memory of each leg, from the run's units."""
    legs: dict[tuple[str, str, str], list[Unit]] = defaultdict(list)
    path = folder / PROGRESS
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:
            unit = msgspec.json.decode(line, type=Unit)
            legs[unit.part.model, unit.part.editor, unit.part.protocol].append(unit)
    costs, where = [], read_profile(folder)
    for (model, editor, protocol), units in legs.items():
        edits = sum(unit.cases for unit in units)
        seconds = sum(unit.edit_seconds for unit in units)
        cost = {"model": model, "editor": editor, "protocol": protocol}
        peak = max(unit.peak_bytes for unit in units)
        if parts := where.get(f"{model}/{editor}/{protocol}"):
            cost["where"] = ", ".join(f"{name} {share:.0%}" for name, (_, share) in parts.items())
        costs.append({**cost, "seconds": seconds / edits if edits else None, "peak": peak})
    return costs


def page(
    rows: Sequence[Row],
    pictures: Pictures | None = None,
    *,
    title: str = "errata",
    setting: tuple[str, str] = ("", ""),
    facts: Sequence[str] = (),
    costs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The report page as text.

    `pictures` is the folder of a run's pictures, or content names to files; `setting` (benchmark
    and template) puts published numbers beside ours; `costs` are seconds and bytes by leg.
    """
    data = {**_data(rows, pictures, setting, facts), "costs": list(costs)}
    parts = {
        "title": markup.escape(title),
        # "<" never appears as such inside the script element, whatever a dataset's text holds
        "data": msgspec.json.encode(data).decode().replace("<", "\\u003c"),
        "css": _text("page.css"),
        "script": _text("page.js"),
    }
    # in one pass: what stands in a place must not be looked at again
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _text("page.html"))


def _text(name: str) -> str:
    return resources.files("errata.bench").joinpath("page", name).read_text(encoding="utf-8")


class _Table:
    """Values by number, in order of first sight."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self.numbers: dict[Any, int] = {value: i for i, value in enumerate(values)}

    def __getitem__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    @property
    def values(self) -> list[Any]:
        return list(self.numbers)


def _data(
    rows: Sequence[Row], pictures: Pictures | None, setting: tuple[str, str], facts: Sequence[str]
) -> dict[str, Any]:
    kept, left_out = _within(rows)
    probes = ordered(row.probe for row in rows) + sorted(_pooled_names(rows))
    probes = list(dict.fromkeys(probes))
    tables = {
        name: _Table(dict.fromkeys(getattr(row, name) for row in rows))
        for name in ("model", "editor", "protocol", "moment", "scorer", "case")
    }
    columns, strings, images = _columns(kept, tables, _Table(probes))
    shown, missing = _embedded(images.values, pictures)
    models = tables["model"].values
    return {
        "models": models,
        "editors": tables["editor"].values,
        "protocols": tables["protocol"].values,
        "moments": tables["moment"].values,
        "scorers": tables["scorer"].values,
        "cases": tables["case"].values,
        "probes": [{"key": name, **msgspec.to_builtins(probe(name))} for name in probes],
        "strings": strings.values,
        "pictures": shown,
        "rows": columns,
        "legs": _rounded(summary(rows)["legs"]),
        "curves": curves(rows),
        "published": [_quoted(one, model) for model in models for one in here(*setting, model)],
        "facts": list(facts),
        "footer": _footer(rows, left_out, missing),
    }


def _quoted(one: Quoted, model: str) -> dict[str, Any]:
    return {**msgspec.to_builtins(one), "here": model}


def _pooled_names(rows: Sequence[Row]) -> set[str]:
    """Columns that only a pooling scorer has."""
    pooling = {row.scorer for row in rows} & {n for n, rule in SCORERS.items() if rule.pooled}
    stems = ("portability", "text_locality")
    return {s for s in stems for row in rows if pooling and row.probe.startswith(s)}


def _within(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows of as many whole cases as the page takes, and how many cases were left out."""
    if len(rows) <= MOST_ROWS:
        return list(rows), 0
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        sizes[row.case] += 1
    kept, total = set(), 0
    for case, size in sizes.items():
        total += size
        if kept and total > MOST_ROWS:
            break
        kept.add(case)
    return [row for row in rows if row.case in kept], len(sizes) - len(kept)


def _columns(
    rows: Sequence[Row], tables: Mapping[str, _Table], probes: _Table
) -> tuple[dict[str, list[Any]], _Table, _Table]:
    """One entry per question and editor; the scorers' values of it stand in one list."""
    strings, images = _Table([""]), _Table()
    columns: dict[str, list[Any]] = defaultdict(list)
    places: dict[tuple[Any, ...], int] = {}
    num_scorers = len(tables["scorer"].values)
    for row in rows:
        key = (row.model, row.editor, row.protocol, row.moment, row.gap, row.seed, row.case)
        key = (*key, row.probe, row.index)
        place = places.setdefault(key, len(places))
        if place == len(columns["case"]):
            for name in ("model", "editor", "protocol", "moment", "case"):
                columns[name].append(tables[name][getattr(row, name)])
            for name in ("gap", "seed", "index"):
                columns[name].append(getattr(row, name))
            columns["probe"].append(probes[row.probe])
            columns["prompt"].append(strings[row.prompt])
            columns["target"].append(strings[row.target])
            columns["images"].append([images[name] for name in row.images])
            for letter, answer in (("b", row.before), ("a", row.after)):
                columns[f"{letter}text"].append(strings[answer.text])
                columns[f"{letter}exact"].append(int(answer.exact))
                said = -1 if answer.said is None else strings[answer.said]
                columns[f"{letter}said"].append(said)
            columns["scores"].append([None] * num_scorers)
        value = None if row.score is None else round(row.score * 10_000)
        columns["scores"][place][tables["scorer"][row.scorer]] = value
    return dict(columns), strings, images


def _rounded(value: Any) -> Any:
    """Floats to five places: what a page needs, at a third of the size."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _embedded(names: Sequence[str], pictures: Pictures | None) -> tuple[list[str | None], int]:
    """Data URIs in the order of the names, None for one that is not kept or no longer fits."""
    found: list[str | None] = []
    total = missing = 0
    for name in names:
        uri = _uri(_file(name, pictures))
        if uri is None or total + len(uri) > MOST_PICTURES:
            missing += 1
            found.append(None)
        else:
            total += len(uri)
            found.append(uri)
    return found, missing


def _file(name: str, pictures: Pictures | None) -> Path | None:
    if isinstance(pictures, Mapping):
        return pictures.get(name)
    # a content name from a ledger must not lead out of the folder
    if pictures is None or Path(name).name != name:
        return None
    return pictures / f"{name}.png"


def _uri(file: Path | None) -> str | None:
    if file is None or not file.is_file():
        return None
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None  # a broken picture is a missing one: the numbers do not hang on it
    picture.thumbnail((SIDE, SIDE))
    small = max(picture.size) <= 96  # drawings of the micro world: PNG is smaller, and exact
    data = io.BytesIO()
    picture.save(data, "PNG") if small else picture.save(data, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


# ------------------------------------------------------------------ lives of edits
_FAMILIES = {
    "reliability": ("reliability", "text_reliability", "image_reliability"),
    "generality": ("rephrase", "image_rephrase"),
}


def _family(name: str) -> str | None:
    for family, names in _FAMILIES.items():
        if name in names:
            return family
    if name.startswith("portability"):
        return "portability"
    return "locality" if probe(name).kind == "locality" else None


def curves(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What sequential editing does to scores: by an edit's position in its life, and by its age.

    position   asked right after the edit, against the number of edits made by then
    age        against the number of edits made since (0: right after)
    length     edits asked after so many of them, against that number (protocol "lifelong")

    Each is a list of points (edits, mean, low, high, cases) per model, editor, scorer and family
    of probes; more than ten abscissae are put into ten bins, each at its mean.
    """
    rows = [row for row in rows if row.protocol != "single" and _family(row.probe)]
    groups = _groups(rows)
    found: dict[tuple[str, ...], list[tuple[int, Row]]] = defaultdict(list)
    for row in rows:
        key = (row.model, row.editor, row.protocol, row.scorer, str(_family(row.probe)))
        found[*key, "length" if row.moment == "length" else "age"].append((row.gap, row))
        if row.moment == "edit":
            size = groups.get((row.model, row.protocol), 0)
            found[*key, "position"].append((row.number % size + 1 if size else row.number + 1, row))
    names = ("model", "editor", "protocol", "scorer", "family", "axis")
    made = []
    for key, points in found.items():
        binned = _binned(points)
        if len(binned) > 1 or key[-1] == "length":
            made.append({**dict(zip(names, key)), "points": binned})
    return made


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    """Edits in a row before the base is back: the first of a group is asked that many later."""
    sizes: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.moment == "end":
            key = (row.model, row.protocol)
            sizes[key] = max(sizes.get(key, 0), row.gap + 1)
    return sizes


def _binned(points: Sequence[tuple[int, Row]]) -> list[list[float]]:
    xs = sorted({x for x, _ in points})
    cut = len(xs) > _BINS
    place = {x: i * _BINS // len(xs) if cut else i for i, x in enumerate(xs)}
    bins: dict[int, list[tuple[int, Row]]] = defaultdict(list)
    for x, row in points:
        bins[place[x]].append((x, row))
    made = []
    for _, inside in sorted(bins.items()):
        values = by_case((f"{row.case} {row.gap}", row.score) for _, row in inside)
        if not values:
            continue
        mean, low, high, count = interval(torch.tensor(values), draws=400)
        at = round(sum(x for x, _ in inside) / len(inside))
        made.append([at, round(mean, 4), round(low, 4), round(high, 4), count])
    return made


def _footer(rows: Sequence[Row], left_out: int, missing: int) -> str:
    runs = ", ".join(sorted({row.run for row in rows}))
    versions = "; ".join(sorted({row.versions for row in rows}))
    words = [f"Run {runs}. {versions}. {len(rows):,} rows."]
    if left_out:
        words.append(f"{left_out:,} cases are in the numbers but too many for the list of cases.")
    if missing:
        words.append(f"{missing:,} pictures are not kept in this page.")
    return " ".join(words)
