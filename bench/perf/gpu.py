"""The kernels on the device at hand: checks, then every suite, one JSON and one table.

    python -m errata.bench.perf.gpu bench/perf/results/NAME.json [--cpu]

Without `--cpu` it wants a GPU and says so when there is none; no figure is ever estimated. It stops
taking up new cases after eight minutes and names what it left out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from errata.bench.perf import bench_codebook, bench_grouped_lora, bench_lora_moe, figures

MAX_MINUTES = 8
# The lookup last: the gigabyte it allocates leaves a warm heap, which speeds up whoever allocates.
SUITES = {
    "experts and routing": bench_lora_moe.measure,
    "grouped": bench_grouped_lora.measure,
    "nearest": bench_codebook.measure,
}


def compare_implementations(device: torch.device) -> dict[str, Any]:
    """Compare the kernels with their definitions, bf16 included, which the interpreter cannot run.

    Args:
        device: The device.

    Returns:
        Differences by dtype.
    """
    from errata.kernels import apply_grouped_lora, nearest_key, square_norms
    from errata.kernels.codebook import ref as codebook
    from errata.kernels.grouped_lora import ref as grouped

    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query = torch.randn(70, 333, device=device).to(dtype)
        keys = torch.randn(3001, 333, device=device).to(dtype)
        max_distance = torch.full((70,), float("inf"), device=device)
        ours = nearest_key(query, keys)
        index, distance = codebook.nearest(query, keys, square_norms(keys), max_distance)
        again = nearest_key(query[:1], keys)
        x, base = (torch.randn(6, 65, 96, device=device).to(dtype) for _ in range(2))
        down = torch.randn(3, 5, 96, device=device).to(dtype)
        up = torch.randn(3, 96, 5, device=device).to(dtype)
        edit_index = torch.tensor([0, 2, -1, 1, 0, 2], device=device)
        with torch.no_grad():
            change = apply_grouped_lora(x, down, up, edit_index, base).float()
        want = grouped.grouped_lora_differentiable(x, down, up, edit_index, base).float()
        result[str(dtype).split(".")[1]] = {
            "nearest: wrong indices": int((ours.index != index).sum()),
            "nearest: largest distance error": float((ours.distance - distance).abs().max()),
            "nearest: same bits alone": bool(torch.equal(again.distance, ours.distance[:1])),
            "grouped: largest relative error": float(
                (change - want).abs().max() / want.abs().max()
            ),
        }
    return result


def run(path: Path, device: torch.device) -> None:
    """Run all checks, then the suites in turn until the time is up.

    Args:
        path: JSON file to write.
        device: The device.
    """
    start_time = time.monotonic()
    torch.manual_seed(0)
    about: dict[str, Any] = figures.describe(device)
    limits = figures.ceilings(device)
    checks: dict[str, Any] = {
        "twins against their definitions": compare_implementations(device),
        "exactness against float64": bench_codebook.exactness(device),
    }
    rows: list[figures.Figure] = []
    left_out = []
    for name, measure in SUITES.items():
        for measured in measure(device, limits):
            rows += measured
            figures.report(path, about, limits, checks, rows)  # a cut run keeps what it has
            if time.monotonic() - start_time > 60 * MAX_MINUTES:
                left_out.append(f"the rest of {name}")
                break
    about |= {"minutes": round((time.monotonic() - start_time) / 60, 1), "left out": left_out}
    figures.report(path, about, limits, checks, rows)


def main(arguments: list[str]) -> None:
    """Entry point of `python -m errata.bench.gpu`.

    Args:
        arguments: Command-line arguments.
    """
    paths = [argument for argument in arguments if argument != "--cpu"]
    if len(paths) != 1:
        raise SystemExit(__doc__)
    device = torch.device("cpu") if "--cpu" in arguments else figures.available_device()
    if device.type == "cpu" and "--cpu" not in arguments:
        raise SystemExit("there is no GPU here: pass --cpu for the figures of the CPU.")
    run(Path(paths[0]), device)


if __name__ == "__main__":
    main(sys.argv[1:])
