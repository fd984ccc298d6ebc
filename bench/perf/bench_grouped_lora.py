"""Rows under different deltas against a loop over rows, a gathered `bmm` and `torch.compile`.

Run `pytest bench/perf/bench_grouped_lora.py`; `errata.bench.gpu` writes the figures of a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from errata.bench.perf import figures
from errata.kernels import grouped_lora

DEVICE = figures.device()


class Case(NamedTuple):
    num_rows: int
    num_tokens: int
    width: int
    num_edits: int
    rank: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).split(".")[1]
        return (
            f"B={self.num_rows} L={self.num_tokens} I=O={self.width} "
            f"E={self.num_edits} R={self.rank} {kind}"
        )


class Inputs(NamedTuple):
    x: Tensor  # [B L I]
    down: Tensor  # [E R I]
    up: Tensor  # [E O R]
    edit: Tensor  # [B]
    base: Tensor  # [B L O]


def cases(where: torch.device) -> list[Case]:
    if where.type == "cpu":
        shapes = [(32, 1, 2048, 32, 8), (16, 64, 2048, 16, 8), (16, 64, 2048, 4, 8)]
        return [Case(*shape, torch.float32) for shape in shapes]
    shapes = [(256, 1, 4096, 256, 8), (64, 48, 4096, 64, 8), (16, 600, 4096, 16, 8)]
    return [Case(*shape, torch.bfloat16) for shape in shapes]


def inputs(case: Case, where: torch.device) -> Inputs:
    generator = torch.Generator(where).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=where, dtype=case.dtype)

    return Inputs(
        normal(case.num_rows, case.num_tokens, case.width),
        0.02 * normal(case.num_edits, case.rank, case.width),
        0.02 * normal(case.num_edits, case.width, case.rank),
        torch.arange(case.num_rows, device=where) % case.num_edits,
        normal(case.num_rows, case.num_tokens, case.width),
    )


def loop(given: Inputs) -> Tensor:
    """One pair of products per row, as a server without a grouped kernel does."""
    rows = [
        own + x @ given.down[edit].T @ given.up[edit].T
        for x, own, edit in zip(given.x, given.base, given.edit.tolist())
    ]
    return torch.stack(rows)


def gathered(given: Inputs) -> Tensor:
    """Two `bmm` over gathered factors."""
    down, up = given.down[given.edit], given.up[given.edit]
    return torch.baddbmm(given.base, torch.bmm(given.x, down.mT), up.mT)


def rivals(given: Inputs, where: torch.device) -> dict[str, figures.Call]:
    found: dict[str, figures.Call] = {
        "errata": lambda: grouped_lora(*given),
        "loop over rows": lambda: loop(given),
        "gathered bmm": lambda: gathered(given),
    }
    if where.type == "cuda":
        compiled = torch.compile(gathered, dynamic=True)
        found["torch.compile"] = lambda: compiled(given)
    return found


def check(given: Inputs) -> None:
    unit = {torch.float32: 1e-4}.get(given.x.dtype, 5e-2)
    torch.testing.assert_close(grouped_lora(*given), loop(given), rtol=unit, atol=unit)


def measure(
    where: torch.device, limits: figures.Ceilings, rounds: int = 7
) -> Iterator[list[figures.Figure]]:
    with torch.no_grad():
        for case in cases(where):
            given = inputs(case, where)
            check(given)
            factors = given.down.numel() + given.up.numel()
            moved = given.x.numel() + 2 * given.base.numel() + factors
            yield figures.compare(
                "grouped",
                str(case),
                rivals(given, where),
                where,
                num_bytes=moved * given.x.element_size(),
                num_flops=4 * given.x.numel() * case.rank,
                limits=limits,
                rounds=rounds,
                memory=True,
            )


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
@torch.no_grad()
def bench_grouped_lora(benchmark, case):
    given = inputs(case, DEVICE)
    check(given)
    figures.in_pytest(benchmark, "grouped", str(case), rivals(given, DEVICE), DEVICE)
