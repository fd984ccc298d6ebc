"""The field's benchmarks as they lie on disk, streamed into cases.

`open_cases(path)` tells the benchmark by the first record; `BENCHMARKS` names them all.
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
"""By name, and in the order in which a file is tried for them."""


def detect(path: str | Path) -> Benchmark:
    """The benchmark a file belongs to, told by its first record's fields.

    Raises `InvalidInputError` for a file of no benchmark, with the fields it has.
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
    """Stream a file's cases; `benchmark` names it where the first record should not decide.

    Raises `InvalidInputError`: see `loading.cases`.
    """
    if benchmark and benchmark not in BENCHMARKS:
        raise InvalidInputError(
            f"benchmark must be one of {', '.join(BENCHMARKS)}; got {benchmark!r}."
        )
    chosen = BENCHMARKS[benchmark] if benchmark else detect(path)
    return cases(chosen, path, options, skip_counts)
