"""The kernels on the device at hand: checks, then every suite, one JSON and one table.

    python -m errata.bench.gpu bench/results/NAME.json [--cpu]

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

MINUTES = 8
# The lookup last: the gigabyte it allocates leaves a warm heap, which speeds up whoever allocates.
SUITES = {
    "experts and routing": bench_lora_moe.measure,
    "grouped": bench_grouped_lora.measure,
    "nearest": bench_codebook.measure,
}


def twins_agree(where: torch.device) -> dict[str, Any]:
    """Ours against the definitions on this device, bf16 included: the interpreter cannot."""
    from errata.kernels import grouped_lora, nearest, square_norms
    from errata.kernels.codebook import ref as codebook
    from errata.kernels.grouped_lora import ref as grouped

    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query = torch.randn(70, 333, device=where).to(dtype)
        keys = torch.randn(3001, 333, device=where).to(dtype)
        reach = torch.full((70,), float("inf"), device=where)
        ours = nearest(query, keys)
        index, distance = codebook.nearest(query, keys, square_norms(keys), reach)
        again = nearest(query[:1], keys)
        x, base = (torch.randn(6, 65, 96, device=where).to(dtype) for _ in range(2))
        down = torch.randn(3, 5, 96, device=where).to(dtype)
        up = torch.randn(3, 96, 5, device=where).to(dtype)
        edit = torch.tensor([0, 2, -1, 1, 0, 2], device=where)
        with torch.no_grad():
            change = grouped_lora(x, down, up, edit, base).float()
        want = grouped.apply(x, down, up, edit, base).float()
        result[str(dtype).split(".")[1]] = {
            "nearest: wrong indices": int((ours.index != index).sum()),
            "nearest: largest distance error": float((ours.distance - distance).abs().max()),
            "nearest: same bits alone": bool(torch.equal(again.distance, ours.distance[:1])),
            "grouped: largest relative error": float(
                (change - want).abs().max() / want.abs().max()
            ),
        }
    return result


def run(path: Path, where: torch.device) -> None:
    """All checks, then the suites in turn until the time is up."""
    begun = time.monotonic()
    torch.manual_seed(0)
    about: dict[str, Any] = figures.describe(where)
    limits = figures.ceilings(where)
    checks: dict[str, Any] = {
        "twins against their definitions": twins_agree(where),
        "exactness against float64": bench_codebook.exactness(where),
    }
    rows: list[figures.Figure] = []
    left_out = []
    for name, measure in SUITES.items():
        for measured in measure(where, limits):
            rows += measured
            figures.report(path, about, limits, checks, rows)  # a cut run keeps what it has
            if time.monotonic() - begun > 60 * MINUTES:
                left_out.append(f"the rest of {name}")
                break
    about |= {"minutes": round((time.monotonic() - begun) / 60, 1), "left out": left_out}
    figures.report(path, about, limits, checks, rows)


def main(arguments: list[str]) -> None:
    paths = [argument for argument in arguments if argument != "--cpu"]
    if len(paths) != 1:
        raise SystemExit(__doc__)
    where = torch.device("cpu") if "--cpu" in arguments else figures.device()
    if where.type == "cpu" and "--cpu" not in arguments:
        raise SystemExit("there is no GPU here: pass --cpu for the figures of the CPU.")
    run(Path(paths[0]), where)


if __name__ == "__main__":
    main(sys.argv[1:])
