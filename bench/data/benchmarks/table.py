"""The benchmarks of the field, read from their published files as a stream of cases.

`open_cases(path)` detects the benchmark from the first record. `BENCHMARKS` has them by
name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from errata.bench.data.benchmarks.ads_edit import ADS_EDIT
from errata.bench.data.benchmarks.comprehendedit import COMPREHENDEDIT
from errata.bench.data.benchmarks.knowedit import KNOWEDIT
from errata.bench.data.benchmarks.mmedit import CAPTION, NQ, OKVQA, VQA
from errata.bench.data.benchmarks.mmke import MMKE
from errata.bench.data.benchmarks.vlkeb import EDIT_ONEHOP, VLKEB
from errata.bench.data.reading.benchmark import DEFAULT_OPTIONS, Benchmark, ReadOptions, cases
from errata.bench.data.reading.json_stream import records
from errata.functional.errors import InvalidInputError
from errata.functional.queries import Case

__all__ = ["BENCHMARKS", "Benchmark", "ReadOptions", "detect", "open_cases"]

BENCHMARKS: Mapping[str, Benchmark] = {
    one.name: one
    for one in (
        MMKE,
        ADS_EDIT,
        VLKEB,
        CAPTION,
        VQA,
        NQ,
        OKVQA,
        COMPREHENDEDIT,
        KNOWEDIT,
        EDIT_ONEHOP,
    )
}
"""Name to benchmark, in the order in which `detect` tries them."""


def detect(path: str | Path) -> Benchmark:
    """Detect the benchmark of a file from the fields of its first record.

    Args:
        path: An annotation file.

    Returns:
        The first benchmark of `BENCHMARKS` that matches.

    Raises:
        InvalidInputError: If the file cannot be read, is empty or matches no benchmark.
    """
    first = next(islice(records(path), 1), None)
    if first is None:
        raise InvalidInputError(f"{path} must hold records; it has none.")
    for benchmark in BENCHMARKS.values():
        if benchmark.matches(first, Path(path)):
            return benchmark
    raise InvalidInputError(
        f"{path} is of no benchmark known here ({', '.join(BENCHMARKS)}); its first record has "
        f"{', '.join(list(first)[:12])}."
    )


def open_cases(
    path: str | Path,
    options: ReadOptions = DEFAULT_OPTIONS,
    skip_counts: Counter[str] | None = None,
    benchmark: str = "",
) -> Iterator[Case]:
    """Stream the cases of an annotation file.

    Args:
        path: An annotation file.
        options: How the file is read.
        skip_counts: Updated with what was skipped or changed. Defaults to a new counter.
        benchmark: A name of `BENCHMARKS`. Empty: detected from the first record.

    Returns:
        An iterator over the cases, in the order of the file.

    Raises:
        InvalidInputError: If `benchmark` is unknown or cannot be detected. Iteration raises the
            errors of `reading.benchmark.cases`.
    """
    if benchmark and benchmark not in BENCHMARKS:
        raise InvalidInputError(
            f"benchmark must be one of {', '.join(BENCHMARKS)}; got {benchmark!r}."
        )
    chosen = BENCHMARKS[benchmark] if benchmark else detect(path)
    return cases(chosen, path, options, skip_counts)
