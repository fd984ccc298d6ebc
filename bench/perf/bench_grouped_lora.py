"""Rows under different deltas against a loop over rows, a gathered `bmm` and `torch.compile`.

Run `pytest bench/perf/bench_grouped_lora.py`; `errata.bench.perf.gpu` writes the figures of a
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from errata.bench.perf import figures
from errata.kernels import apply_grouped_lora

DEVICE = figures.available_device()


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
    edit_index: Tensor  # [B]
    base: Tensor  # [B L O]


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        shapes = [(32, 1, 2048, 32, 8), (16, 64, 2048, 16, 8), (16, 64, 2048, 4, 8)]
        return [Case(*shape, torch.float32) for shape in shapes]
    shapes = [(256, 1, 4096, 256, 8), (64, 48, 4096, 64, 8), (16, 600, 4096, 16, 8)]
    return [Case(*shape, torch.bfloat16) for shape in shapes]


def inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=case.dtype)

    return Inputs(
        normal(case.num_rows, case.num_tokens, case.width),
        0.02 * normal(case.num_edits, case.rank, case.width),
        0.02 * normal(case.num_edits, case.width, case.rank),
        torch.arange(case.num_rows, device=device) % case.num_edits,
        normal(case.num_rows, case.num_tokens, case.width),
    )


def loop(tensors: Inputs) -> Tensor:
    """One pair of products per row, as a server without a grouped kernel does."""
    rows = [
        own + x @ tensors.down[edit].T @ tensors.up[edit].T
        for x, own, edit in zip(tensors.x, tensors.base, tensors.edit_index.tolist())
    ]
    return torch.stack(rows)


def gathered_bmm(tensors: Inputs) -> Tensor:
    """Two `bmm` over gathered factors."""
    down, up = tensors.down[tensors.edit_index], tensors.up[tensors.edit_index]
    return torch.baddbmm(tensors.base, torch.bmm(tensors.x, down.mT), up.mT)


def rivals(tensors: Inputs, device: torch.device) -> dict[str, figures.Call]:
    found: dict[str, figures.Call] = {
        "errata": lambda: apply_grouped_lora(*tensors),
        "loop over rows": lambda: loop(tensors),
        "gathered bmm": lambda: gathered_bmm(tensors),
    }
    if device.type == "cuda":
        compiled = torch.compile(gathered_bmm, dynamic=True)
        found["torch.compile"] = lambda: compiled(tensors)
    return found


def check(tensors: Inputs) -> None:
    unit = {torch.float32: 1e-4}.get(tensors.x.dtype, 5e-2)
    torch.testing.assert_close(apply_grouped_lora(*tensors), loop(tensors), rtol=unit, atol=unit)


def measure(
    device: torch.device, limits: figures.Ceilings, rounds: int = 7
) -> Iterator[list[figures.Figure]]:
    with torch.no_grad():
        for case in cases(device):
            given = inputs(case, device)
            check(given)
            factors = given.down.numel() + given.up.numel()
            moved = given.x.numel() + 2 * given.base.numel() + factors
            yield figures.compare(
                "grouped",
                str(case),
                rivals(given, device),
                device,
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
