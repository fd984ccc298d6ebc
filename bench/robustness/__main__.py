"""Everything hostile in one go: `python -m errata.bench.robustness --minutes 10`.

Mutated delta files of all kinds, single and stacked, bound and asked where they load; mutated
trained weights and sequences; SIGKILL while runs, trainings, merges and fuses write; odd images;
hostile settings. Counts follow from the minutes. Exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from errata.bench.robustness.crash_runs import kill_and_swap, kill_run, kill_training
from errata.bench.robustness.crash_writes import OPERATIONS, crash
from errata.bench.robustness.fuzz_delta import FuzzReport, fuzz
from errata.bench.robustness.fuzz_folders import fuzz_folders
from errata.bench.robustness.fuzz_inputs import fuzz_images, fuzz_settings
from errata.bench.robustness.fuzz_states import fuzz_states

RUN = """
output_dir = "decided by the test"
num_threads = 1
[cases]
source = "world"
num_cases = 12
[[models]]
id = "tiny/llava"
[[editors]]
type = "lora"
num_steps = 2
[[protocols]]
type = "single"
batch_size = 1
[[protocols]]
type = "sequential"
sequence_length = 4
"""


class Line(NamedTuple):
    """One line of the table."""

    what: str
    count: int
    refused: int
    accepted: int
    slowest: float  # seconds of processor time of one refusal; 0: not measured
    findings: list[str]


def _fuzzed(what: str, count: int, report: FuzzReport) -> Line:
    refused, loaded = sum(report.refused.values()), sum(report.loaded.values())
    return Line(what, count, refused, loaded, report.slowest, report.findings)


def _deltas(count: int, seed: int) -> Line:
    report = fuzz(count, seed, bind_accepted=True)
    return _fuzzed("mutated delta files, all kinds, single and stacked", count, report)


def _folders(count: int, seed: int) -> Line:
    return _fuzzed("mutated PEFT folders and checkpoints", count, fuzz_folders(count, seed))


def _states(count: int, seed: int) -> Line:
    return _fuzzed("mutated trained weights and sequences", count, fuzz_states(count, seed))


def _images(count: int, seed: int) -> Line:
    return _fuzzed("odd images", count, fuzz_images(count, seed))


def _settings(count: int, seed: int) -> Line:
    return _fuzzed("hostile settings of runs and editors", count, fuzz_settings(count, seed))


def _write_kills(count: int, seed: int) -> Line:
    outcomes: Counter[str] = Counter()
    for operation in OPERATIONS:
        outcomes += crash(operation, count // len(OPERATIONS), seed)
    broken = outcomes["broken"] + outcomes["parts left after the next write"]
    findings = [f"{broken} broken or left over"] if broken else []
    total = count // len(OPERATIONS) * len(OPERATIONS)
    what = f"kills while writing ({', '.join(OPERATIONS)})"
    return Line(what, total, 0, total - broken, 0.0, findings)


def _run_kills(count: int, seed: int) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_run(RUN, Path(folder), count, seed)
    findings = [] if outcome.same else [f"{outcome}"]
    return Line("kills of a run", outcome.kills, 0, outcome.starts, 0.0, findings)


def _swap_kills(count: int, seed: int) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_and_swap(Path(folder), 4 * count, count, seed)
    findings = [] if outcome.same else [f"{outcome}"]
    what = "kills of a run whose weights are swapped once"
    return Line(what, outcome.kills, 0, outcome.starts, 0.0, findings)


def _training_kills(count: int, seed: int) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_training(Path(folder), count, seed)
    findings = [] if outcome.same else [f"{outcome}"]
    return Line("kills of a training", outcome.kills, 0, outcome.starts, 0.0, findings)


# per ten minutes on two cores; the deltas in two halves, one for each core
SUITES: tuple[tuple[Callable[[int, int], Line], int], ...] = (
    (_deltas, 150_000),
    (_deltas, 150_000),
    (_write_kills, 400),
    (_run_kills, 80),
    (_swap_kills, 20),
    (_training_kills, 30),
    (_states, 20_000),
    (_folders, 5_000),
    (_images, 5_000),
    (_settings, 1_500),
)


def _work(number: int, count: int, seed: int) -> Line:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Pillow, about damaged metadata
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        return SUITES[number][0](count, seed)


def table(lines: list[Line], seconds: float) -> str:
    """The results as markdown.

    Args:
        lines: One per suite.
        seconds: Time of all.

    Returns:
        The table.
    """
    merged: dict[str, Line] = {}
    for line in lines:
        old = merged.get(line.what)
        merged[line.what] = (
            Line(
                line.what,
                old.count + line.count,
                old.refused + line.refused,
                old.accepted + line.accepted,
                max(old.slowest, line.slowest),
                old.findings + line.findings,
            )
            if old
            else line
        )
    rows = [
        f"| {one.what} | {one.count:,} | {one.refused:,} | {one.accepted:,} | "
        f"{f'{one.slowest * 1e3:.0f} ms' if one.slowest else '–'} | {len(one.findings)} |"
        for one in merged.values()
    ]
    head = (
        "| | tried | refused | read, or resumed | slowest | findings |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    about = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}: {seconds / 60:.0f} minutes."
    )
    return "\n".join([head, *rows, "", about])


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Command-line arguments.

    Returns:
        Exit code: 1 if something was found.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long, on two cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the table to this file")
    options = parser.parse_args(argv)
    scale, began = options.minutes / 10, time.monotonic()
    lines = []
    with ProcessPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        jobs = [
            pool.submit(_work, number, max(4, round(count * scale)), options.seed * 100 + number)
            for number, (_, count) in enumerate(SUITES)
        ]
        for job in jobs:
            line = job.result()
            lines.append(line)
            sys.stdout.write(f"{line.what}: {line.count:,}, {len(line.findings)} findings\n")
            for finding in line.findings[:10]:
                sys.stdout.write(f"  {finding}\n")
            sys.stdout.flush()
    text = table(lines, time.monotonic() - began)
    sys.stdout.write(f"\n{text}\n")
    if options.output:
        options.output.write_text(f"{text}\n")
    return 1 if any(line.findings for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
