"""`errata run`, `report`, `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from errata.functional.errors import InvalidInputError

if TYPE_CHECKING:
    from errata.bench.storage.results_log import ResultRow


def _run(options: argparse.Namespace) -> None:
    import msgspec

    from errata.bench.runs.settings_file import read_settings

    settings = read_settings(options.file)
    if options.output:
        settings = msgspec.structs.replace(settings, output_dir=options.output)

    from errata.bench.report import tables, timing
    from errata.bench.runs.runner import run
    from errata.bench.storage.results_log import read_rows

    text = options.file.read_text()
    folder = run(settings, text, overwrite=options.overwrite, profile=options.profile)
    rows = read_rows(folder)
    print(tables.table(rows))
    _print_diverged(rows)
    _print_skipped(folder)
    if options.profile:
        print(f"\n{timing.timing_table(folder)}")
    print(f"\n{folder / 'report.html'}")


def _report(options: argparse.Namespace) -> None:
    import msgspec

    from errata.bench.report import page, summary, tables
    from errata.bench.storage.results_log import read_rows

    rows = read_rows(options.run)
    if not rows:
        raise InvalidInputError(
            f"{options.run} must hold results; its results log is empty so far."
        )
    if options.html:
        settings = options.run / "settings.toml"
        text = settings.read_text() if settings.is_file() else ""
        page.write_page(rows, options.html, folder=options.run, settings=text, title=options.title)
        print(options.html)
    elif options.format == "json":
        print(msgspec.json.format(msgspec.json.encode(summary.summary_json(rows))).decode())
    else:
        print(tables.table(rows, options.format))
        if options.format == "terminal":
            _print_diverged(rows)
            _print_skipped(options.run)


def _print_diverged(rows: list[ResultRow]) -> None:
    for model, editor in sorted({(row.model, row.editor) for row in rows if row.fault}):
        leg = [row for row in rows if (row.model, row.editor) == (model, editor)]
        cases = {row.case for row in leg if row.fault}
        print(f"\n{model}, {editor}: {len(cases)} edit(s) diverged; the base's answers count")


def _print_skipped(folder: Path) -> None:
    from errata.bench.storage.skips import SKIPPED, read_skipped

    for model, faults in read_skipped(folder).items():
        print(f"\n{model}: {len(faults)} case(s) that it cannot read were skipped ({SKIPPED})")


def _compare(options: argparse.Namespace) -> None:
    from errata.bench.report import comparison as compare
    from errata.bench.storage.results_log import read_rows

    names = [str(path) for path in options.runs]
    short = [path.resolve().name for path in options.runs]
    labels = short if len(set(short)) == len(short) else names
    if len(set(labels)) < len(labels):
        raise InvalidInputError(
            f"runs to compare must be different folders; got {', '.join(names)}."
        )
    runs = {label: read_rows(path) for label, path in zip(labels, options.runs)}
    print(compare.table(runs))
