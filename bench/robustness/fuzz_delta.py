"""Feed mutated delta files to `load`: `python -m errata.bench.robustness.fuzz_delta --files
100000`.

Every file must either be refused with an ErrataError that names it, or load as a delta whose
content is what its digest says. Each is held to one second and to an address space of file size +
64 MB above what the process had; an audit hook sees to it that nothing is imported, unpickled,
executed, written or fetched meanwhile. A run is reproducible from its seed.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from errata.bench.robustness.mutations import MUTATIONS, mutate
from errata.bench.robustness.samples import editor_samples, sample
from errata.functional import Delta, Model, Query, bind, load_delta, save_delta
from errata.functional.deltas.inspection import inspect_delta
from errata.functional.deltas.merging import require_same_base
from errata.functional.deltas.serialization import digest
from errata.functional.errors import BaseMismatchError, ErrataError

__all__ = ["FuzzReport", "fuzz"]

FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "pickle.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "ctypes.",
    "os.remove",
    "os.rename",
    "shutil.",
)


class FuzzReport(NamedTuple):
    """What a run saw; `bad` is empty if the law held."""

    refused: Counter[str]
    loaded: Counter[str]
    slowest: float  # seconds of processor time
    findings: list[str]


def _make_audit_hook(events: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if _WATCHING[0] and event.startswith(FORBIDDEN):
            events.append(f"{event} {str(args)[:80]}")
        if _WATCHING[0] and event == "open" and isinstance(args[1], str) and args[1][:1] in "wax+":
            events.append(f"open for writing {args[0]!r}")

    return hook


_WATCHING = [False]


def fuzz(
    num_files: int,
    seed: int = 0,
    folder: Path | None = None,
    limit_memory: bool = True,
    bind_accepted: bool = False,
) -> FuzzReport:
    """Load mutated delta files.

    Args:
        num_files: Files.
        seed: Seed.
        folder: Where to write them.
        limit_memory: Whether to hold each to its share of address space.
        bind_accepted: Whether files that load are bound to a tiny model, which answers a question.

    Returns:
        What was refused, loaded and found.
    """
    draw = random.Random(seed)
    originals = []
    report = FuzzReport(Counter(), Counter(), 0.0, [])
    seen: list[str] = []
    sys.addaudithook(_make_audit_hook(seen))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "hostile.safetensors"
        model, made = editor_samples() if bind_accepted else (None, [])
        samples = [sample(seed * 1000 + n, stacked=n % 3 == 2) for n in range(24)]
        for good in [*samples, *made]:
            save_delta(path, good)
            originals.append((good, path.read_bytes()))
            load_delta(path)
        slowest = 0.0
        for number in range(num_files):
            good, raw = draw.choice(originals)
            kind, forged = mutate(raw, draw)
            path.write_bytes(forged)
            limits = resource.getrlimit(resource.RLIMIT_AS)
            if limit_memory:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + len(forged) + (64 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
            _WATCHING[0] = True
            began, spent = time.perf_counter(), time.process_time()
            try:
                fault = _load_and_check(path, kind, good, report)
            finally:
                _WATCHING[0] = False
                seconds, wall = time.process_time() - spent, time.perf_counter() - began
                resource.setrlimit(resource.RLIMIT_AS, limits)
            slowest = max(slowest, seconds)
            if seconds > 1 or wall > 20:  # a busy machine may stop us for a while
                fault = f"took {seconds:.2f} s of processor time, {wall:.1f} s in all"
            if not fault and model is not None:
                fault = _bind_and_answer(model, path)
            if fault or seen:
                report.findings.append(
                    f"file {number} of seed {seed} ({kind}): {fault or seen[:3]}"
                )
                seen.clear()
    return report._replace(slowest=slowest)


def _load_and_check(path: Path, kind: str, original: Delta, report: FuzzReport) -> str:
    """Load a file; "" if it was refused properly or loaded as what it says it is."""
    try:
        delta = load_delta(path)
    except ErrataError as error:
        report.refused[kind] += 1
        text = str(error)
        if str(path) not in text:
            return f"the error does not name the file: {text[:200]}"
        return "" if len(text) < 4000 and text.isprintable() else f"unreadable error {text[:80]!r}"
    except BaseException as error:  # noqa: BLE001 - anything but an ErrataError is a finding
        return f"{type(error).__name__}: {str(error)[:200]}"
    if kind == "another base":
        try:
            require_same_base([original, delta])
        except BaseMismatchError:
            report.refused[kind] += 1
            return ""
        return "a delta for another base was taken for one of this base"
    report.loaded[kind] += 1
    if digest(delta) != inspect_delta(path).digest:
        return "the content is not what the digest says"
    if not all(bool(torch.isfinite(x).all()) for x in delta.tensors.values()):
        return "holds values that are not finite"
    paths = [text for text in _texts(msgspec.to_builtins(delta.header)) if _is_path(text)]
    return f"holds a path of a machine: {paths[0]!r}" if paths else ""


def _texts(value: Any) -> Iterator[str]:
    """Every string of plain data, keys included; facts are texts of their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("facts", "question_template"):
                yield from (key, *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "\\", "file:")) or text[1:3] in (":\\", ":/")


def _bind_and_answer(model: Model, path: Path) -> str:
    """Bind a file that loads, and ask it something; "" if it answers or says why not."""
    try:
        delta = load_delta(path)
        bound = bind(model, delta)
        inputs = bound.preprocess([Query("who is it?", "bo")])
        with torch.no_grad():
            bound.decode(bound.params, bound.embed(bound.params, inputs))
    except ErrataError as error:
        return "" if len(str(error)) <= 2000 else "too long an error"
    except BaseException as error:  # noqa: BLE001 - anything but an ErrataError is a finding
        return f"{type(error).__name__} when it is bound: {str(error)[:200]}"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Command-line arguments.

    Returns:
        Exit code: 1 if something was found.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    report = fuzz(args.files, args.seed, bind_accepted=True)
    seconds = time.perf_counter() - began
    write = sys.stdout.write
    for kind in MUTATIONS:
        write(f"{kind:26} refused {report.refused[kind]:7} loaded {report.loaded[kind]:6}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    write(
        f"{args.files} files, {sum(report.refused.values())} refused, "
        f"{sum(report.loaded.values())} loaded, {len(report.findings)} findings; slowest "
        f"{report.slowest * 1e3:.0f} ms, {seconds:.0f} s in all, peak {peak} MB\n"
    )
    for line in report.findings[:20]:
        write(line + "\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
