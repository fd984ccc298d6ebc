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
    return 0 if all(report.usable for report in reports) else 1
