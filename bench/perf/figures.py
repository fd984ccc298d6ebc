"""Figures of one run: rivals timed in turns, ratios, shares of measured ceilings.

A round calls every rival once, so that what else the machine does falls on all of them; the ratios
are between the fastest rounds. On a CPU the time of one thread is the processor's, which other
programs do not lengthen.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from errata.bench.evaluation.memory import measure_peak

__all__ = ["Figure", "available_device", "ceilings", "compare", "describe", "in_pytest", "report"]

Call = Callable[[], Any]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One provider on one case."""

    suite: str
    case: str
    provider: str
    seconds: float  # fastest round
    median: float
    times_ours: float  # seconds over those of errata in the same rounds
    peak_bytes: int | None = None  # growth of the peak during one call
    copy_share: float | None = None  # bytes that must move / seconds / measured copy rate
    matmul_share: float | None = None  # FLOPs / seconds / measured matmul rate


class Ceilings(msgspec.Struct, frozen=True):
    """What this device reached in this run."""

    copy: float  # bytes read and written per second
    matmul: float  # FLOP per second
    dtype: str  # of the matrices


def available_device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the device and the software that runs on it.

    Args:
        device: The device.

    Returns:
        Names and versions.
    """
    about: dict[str, Any] = {"torch": str(torch.__version__), "python": platform.python_version()}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)} | about
    names = [platform.processor() or platform.machine()]
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        lines = listed.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    shown = f"CPU: {names[0]}, {len(names)} cores"
    return {"device": shown, "threads": torch.get_num_threads(), "gpu": None} | about


def compare(
    suite: str,
    case: str,
    rivals: Mapping[str, Call],
    device: torch.device,
    *,
    num_bytes: float,
    num_flops: float,
    limits: Ceilings,
    rounds: int = 7,
    memory: bool = False,
) -> list[Figure]:
    """Time rivals in turns, ours first; each is called once before.

    Args:
        suite: Name of the suite.
        case: Name of the case.
        rivals: Calls by name.
        device: The device.
        num_bytes: Bytes that the case must move.
        num_flops: Operations that it must do.
        limits: Ceilings of the device.
        rounds: Timed rounds.
        memory: Whether to measure peak memory.

    Returns:
        One figure per rival.
    """
    for call in rivals.values():
        call()  # compiles, fills caches, allocates what the libraries keep
    peaks = {name: _peak(call, device) if memory else None for name, call in rivals.items()}
    spent: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            spent[name].append(_seconds(call, device))
    ours = min(next(iter(spent.values())))
    return [
        Figure(
            suite=suite,
            case=case,
            provider=name,
            seconds=min(times),
            median=statistics.median(times),
            times_ours=min(times) / ours,
            peak_bytes=peaks[name],
            copy_share=num_bytes / min(times) / limits.copy,
            matmul_share=num_flops / min(times) / limits.matmul,
        )
        for name, times in spent.items()
    ]


def _seconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    call()
    return clock() - begun


def _peak(call: Call, device: torch.device) -> int:
    gc.collect()
    if device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed earlier must not hide what is taken now
    with measure_peak(device) as idle:
        pass
    with measure_peak(device) as busy:
        call()
    return busy.bytes - idle.bytes


def ceilings(device: torch.device) -> Ceilings:
    """Measure bandwidth and arithmetic by copying 1 GiB and multiplying square matrices.

    Args:
        device: The device.

    Returns:
        Bytes and operations per second.
    """
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = 8192 if gpu else 1536
    source = torch.empty(1 << (30 if gpu else 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(a, b)

    best = {}
    for call in (copy, multiply):
        call()
        best[call] = min(_seconds(call, device) for _ in range(7))
    return Ceilings(
        2 * source.numel() / best[copy], 2 * size**3 / best[multiply], str(dtype).split(".")[1]
    )


def report(
    path: Path,
    metadata: Mapping[str, Any],
    limits: Ceilings,
    checks: Mapping[str, Any],
    figures: Sequence[Figure],
) -> None:
    """Write a JSON file and a markdown table of the same name.

    Args:
        path: The JSON file.
        metadata: Device and software.
        limits: Ceilings of the device.
        checks: Results of the checks.
        figures: Measurements.
    """
    content = {"about": metadata, "ceilings": limits, "checks": checks, "figures": figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    path.with_suffix(".md").write_text(_table(metadata, limits, checks, figures))


def _table(
    metadata: Mapping[str, Any],
    limits: Ceilings,
    checks: Mapping[str, Any],
    figures: Sequence[Figure],
) -> str:
    lines = [f"{key}: {value}  " for key, value in metadata.items()]
    lines.append(
        f"ceilings in this run: copy {limits.copy / 1e9:.1f} GB/s, "
        f"{limits.dtype} matmul {limits.matmul / 1e9:.0f} GFLOP/s"
    )
    for name, check in checks.items():
        lines += ["", f"**{name}**", ""] + [f"- {key}: {value}" for key, value in check.items()]
    lines += [
        "",
        "| suite | case | provider | ms (fastest) | ms (median) | times ours | peak MB "
        "| of copy rate | of matmul rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        peak = "" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:.1f}"
        lines.append(
            f"| {figure.suite} | {figure.case} | {figure.provider} | {figure.seconds * 1e3:.3f} "
            f"| {figure.median * 1e3:.3f} | {figure.times_ours:.2f} | {peak} "
            f"| {_format_share(figure.copy_share)} | {_format_share(figure.matmul_share)} |"
        )
    return "\n".join(lines) + "\n"


def _format_share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def in_pytest(
    benchmark: Any, suite: str, case: str, rivals: Mapping[str, Call], device: torch.device
) -> None:
    """Time one case under pytest-benchmark, and record how many times as long each rival takes.

    Args:
        benchmark: pytest-benchmark's fixture.
        suite: Name of the suite.
        case: Name of the case.
        rivals: Calls by name, ours first.
        device: The device.
    """
    limits = Ceilings(1.0, 1.0, "")  # ratios alone are kept
    rows = compare(suite, case, rivals, device, num_bytes=0, num_flops=0, limits=limits, rounds=3)
    benchmark.group = case
    benchmark.extra_info.update({row.provider: round(row.times_ours, 2) for row in rows})
    benchmark.pedantic(next(iter(rivals.values())), rounds=3)
