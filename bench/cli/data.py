"""The commands on data and results: `data verify`, `report`, `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from errata.bench.cli.run import _compare, _report

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the commands to the subparsers of `errata`.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
    """
    data = subparsers.add_parser(
        "data", help="look at benchmark data", description="Benchmark data."
    )
    kinds = data.add_subparsers(metavar="WHAT", required=True)
    check = kinds.add_parser(
        "verify",
        help="what a folder or file holds: counts, missing images, oddities",
        description="Read annotation files once and say what they hold, lack and hide. Exit code "
        "1 when a record cannot be read or an image is missing.",
    )
    check.add_argument("path", type=Path, help="an annotation file, or a folder with some")
    check.add_argument("--images", default="", help="folder the image names start from")
    check.add_argument("--decode", action="store_true", help="open every image there is")
    check.add_argument("--json", action="store_true", help="print the report for machines")
    check.add_argument(
        "--model",
        help="micro/NAME, a folder or a hub id: read every query as this model does, and list all "
        "it cannot read",
    )
    check.add_argument("--template", default="default", help="prompt template of the model")
    check.set_defaults(command=_verify)

    report = subparsers.add_parser(
        "report",
        help="tables and the page of a finished or running run",
        description="Print a run's tables; write its page anew with --html.",
    )
    report.add_argument("run", type=Path, help="the run's folder")
    report.add_argument(
        "--format", default="terminal", choices=["terminal", "markdown", "latex", "json"]
    )
    report.add_argument("--html", type=Path, help="write the page to this file")
    report.add_argument("--title", default="", help="of the page")
    report.set_defaults(command=_report)

    compare = subparsers.add_parser(
        "compare",
        help="runs side by side, with paired significance",
        description="Compare runs on the cases they share; one run compares its editors.",
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    compare.set_defaults(command=_compare)


def _verify(options: argparse.Namespace) -> int:
    import msgspec

    from errata.bench.data.verification import format_report, verify

    reports = verify(options.path, options.images, decode=options.decode)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(reports)).decode())
    else:
        print("\n\n".join(map(format_report, reports)))
    usable = all(report.usable for report in reports)
    if options.model:
        usable = _verify_with_model(options) and usable
    return 0 if usable else 1


def _verify_with_model(options: argparse.Namespace) -> bool:
    """Read every query of every case as a model does; print what it cannot read."""
    from errata.bench.data.benchmarks.table import open_cases
    from errata.bench.data.reading.benchmark import ReadOptions
    from errata.bench.data.verification import annotation_files
    from errata.bench.evaluation.questions import find_unreadable
    from errata.bench.runs.settings import ModelSettings
    from errata.bench.runs.sources import open_model

    model = open_model(ModelSettings(id=options.model, template=options.template))
    usable = True
    for path in annotation_files(options.path):
        read_options = ReadOptions(
            image_root=options.images, missing_images="skip", invalid_records="skip"
        )
        cases = list(open_cases(path, read_options))
        faults = find_unreadable(model, cases)
        print(f"\n{path}: {options.model} reads {len(cases) - len(faults)} of {len(cases)} cases")
        for fault in faults.values():
            print(f"  {fault}")
        usable = usable and not faults
    return usable
