"""The nearest key against `torch.cdist` (GRACE's way), `addmm`, faiss and `torch.compile`.

Run `pytest bench/perf/bench_codebook.py`; `errata.bench.perf.gpu` writes the figures of a device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from errata.bench.perf import figures
from errata.kernels import nearest_key, square_norms

DEVICE = figures.available_device()
NORMS = (50, 100, 140, 300, 450)


class Case(NamedTuple):
    num_keys: int
    width: int
    num_rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).split(".")[1]
        return f"N={self.num_keys} D={self.width} B={self.num_rows} {kind}"


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [Case(100_000, 2560, num_rows, torch.float32) for num_rows in (1, 16, 256)]
    grid = itertools.product(
        (100, 1_000, 10_000, 100_000, 1_000_000), (2560, 4096), (1, 16, 256, 4096)
    )
    return [Case(*shape, torch.bfloat16) for shape in grid]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Keys around a common mean, as activations are; half of the queries near a key."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=case.dtype)

    keys = normal(case.num_keys, case.width).add_(normal(case.width))
    picked = torch.arange(case.num_rows, device=device) * 7919 % case.num_keys
    query = keys[picked] + 0.1 * normal(case.num_rows, case.width)
    query[::2] = normal(*query[::2].shape)
    return query, keys, square_norms(keys)


def expand(query: Tensor, keys: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """`addmm` and `min`: the expansion of the square, norms at hand."""
    if keys.dtype == torch.float32:
        return torch.addmm(norms, query, keys.T, alpha=-2).min(1)
    return (norms - 2 * torch.mm(query, keys.T).float()).min(1)


def rivals(
    case: Case, query: Tensor, keys: Tensor, norms: Tensor, device: torch.device
) -> dict[str, figures.Call]:
    found: dict[str, figures.Call] = {
        "errata": lambda: nearest_key(query, keys, norms=norms),
        "addmm + min": lambda: expand(query, keys, norms),
    }
    if case.num_keys * case.num_rows <= 1 << 30:
        found["cdist + min"] = lambda: torch.cdist(query.float(), keys.float()).min(1)
    if device.type == "cuda":
        compiled = torch.compile(expand, dynamic=True)
        found["torch.compile"] = lambda: compiled(query, keys, norms)
    elif find_spec("faiss") is not None:
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(case.width)
        index.add(keys.numpy())
        found["faiss IndexFlatL2"] = lambda: index.search(query.numpy(), 1)
    return found


def check(query: Tensor, keys: Tensor) -> None:
    """Ours against float64, in slices of the keys."""
    best = torch.full_like(query[:, 0], math.inf, dtype=torch.float64)
    index = torch.zeros_like(best, dtype=torch.int64)
    wide = query.double()
    step = max(1, (1 << 28) // (8 * keys.shape[1]))
    for start in range(0, keys.shape[0], step):
        part = keys[start : start + step].double()
        square = (part.square().sum(1) - 2 * wide @ part.T).min(1)
        nearer = square.values < best
        best = torch.where(nearer, square.values, best)
        index = torch.where(nearer, square.indices + start, index)
    assert torch.equal(nearest_key(query, keys).index, index)


def measure(
    device: torch.device, limits: figures.Ceilings, rounds: int = 7
) -> Iterator[list[figures.Figure]]:
    for case in cases(device):
        query, keys, norms = inputs(case, device)
        check(query, keys)
        yield figures.compare(
            "nearest",
            str(case),
            rivals(case, query, keys, norms, device),
            device,
            num_bytes=(keys.numel() + query.numel()) * keys.element_size(),
            num_flops=2 * case.num_rows * keys.numel(),
            limits=limits,
            rounds=rounds,
        )


def clusters(norm: float, num_keys: int, num_rows: int, width: int, device: torch.device):
    """Near-duplicates in tens, 0.35 apart, of a given length; half of the queries are keys,
    half lie near a group, about as far from each of its ten."""
    generator = torch.Generator(device).manual_seed(int(norm))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    centers = normal(num_keys // 10, width)
    mean = normal(width)
    if norm > 400:  # massive dimensions, as real activations have
        centers[:, :2] += 300
        norm = math.sqrt(norm**2 - 2 * 300**2)
    centers += mean * math.sqrt(max(norm**2 - width, 0)) / mean.norm()
    keys = centers.repeat_interleave(10, 0)[:num_keys]
    keys = keys + 0.35 / math.sqrt(2 * width) * normal(*keys.shape)
    picked = torch.randint(num_keys, (num_rows,), generator=generator, device=device)
    query = keys[picked]
    beside = centers.repeat_interleave(10, 0)[picked[::2]]
    query[::2] = beside + 0.35 / math.sqrt(2 * width) * normal(*beside.shape)
    return query, keys


def exactness(device: torch.device, num_keys: int = 4000, num_rows: int = 2400) -> dict[str, Any]:
    """Wrong indices of ours and of cdist against float64, for vectors of growing length."""
    counted: dict[str, Any] = {}
    for norm in NORMS:
        query, keys = clusters(norm, num_keys, num_rows, 2560, device)
        wide, widest = query.double(), keys.double()
        squares = widest.square().sum(1) - 2 * wide @ widest.T
        index = squares.argmin(1)
        exact = (wide - widest[index]).square().sum(1).sqrt()
        ours, peer = nearest_key(query, keys), torch.cdist(query, keys).min(1)
        counted[f"norm {float(keys.norm(dim=1).mean()):.0f}"] = {
            "queries": num_rows,
            "errata wrong": int((ours.index != index).sum()),
            "cdist wrong": int((peer.indices != index).sum()),
            "errata largest distance error": float((ours.distance - exact).abs().max()),
            "cdist largest distance error": float((peer.values - exact).abs().max()),
        }
    return counted


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def bench_nearest(benchmark, case):
    query, keys, norms = inputs(case, DEVICE)
    check(query, keys)
    calls = rivals(case, query, keys, norms, DEVICE)
    figures.in_pytest(benchmark, "nearest", str(case), calls, DEVICE)
