"""Expert routing and application against LiveEdit's einsums and against `torch.compile`.

Run `pytest bench/perf/bench_lora_moe.py`; `errata.bench.perf.gpu` writes the figures of a device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.bench.perf import figures
from errata.kernels import Routes, apply_experts, route_experts

DEVICE = figures.available_device()
RANK = 4
FEATURES = 4096  # LiveEdit: four slots of width 1024


class Case(NamedTuple):
    num_tokens: int
    width: int
    num_experts: int
    num_chosen: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).split(".")[1]
        return f"L={self.num_tokens} D={self.width} M={self.num_experts} m={self.num_chosen} {kind}"


class Inputs(NamedTuple):
    hidden_states: Tensor  # [1 L D]
    down: Tensor  # [M R D]
    up: Tensor  # [M R D]
    routes: Routes
    norm: tuple[Tensor, Tensor]


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [Case(600, 4096, 1000, chosen, torch.float32) for chosen in (4, 100)]
    grid = itertools.product((1, 48, 600), (10, 100, 1_000, 10_000, 100_000))
    return [
        Case(length, 4096, pool, min(pool, chosen), torch.bfloat16)
        for length, pool in grid
        for chosen in (4, 100)
        if chosen <= pool or chosen == 4
    ]


def inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=case.dtype)

    chosen = torch.randperm(case.num_experts, generator=generator, device=device)
    ids = chosen[: case.num_chosen].sort()[0][None]
    weights = torch.rand(ids.shape, generator=generator, device=device) / case.num_chosen
    count = torch.full((1,), case.num_chosen, device=device)
    down, up = (0.02 * normal(case.num_experts, RANK, case.width) for _ in range(2))
    norm = torch.ones_like(down[0, 0]), torch.zeros_like(down[0, 0])
    return Inputs(
        normal(1, case.num_tokens, case.width), down, up, Routes(ids, weights, count), norm
    )


def liveedit(tensors: Inputs) -> Tensor:
    """What LiveEdit runs: the gather, two einsums, the second of which forms [L, m, D]."""
    x = F.layer_norm(tensors.hidden_states[0], tensors.hidden_states.shape[-1:], *tensors.norm)
    ids, weights = tensors.routes.ids[0], tensors.routes.weights[0].to(x.dtype)
    inner = F.relu(torch.einsum("ld,mrd->lmr", x, tensors.down[ids]))
    return tensors.hidden_states + torch.einsum("lmr,mrd,m->ld", inner, tensors.up[ids], weights)


def two_products(tensors: Inputs) -> Tensor:
    """The same as two matrix products over (expert, rank) columns."""
    x = F.layer_norm(tensors.hidden_states[0], tensors.hidden_states.shape[-1:], *tensors.norm)
    ids, weights = tensors.routes.ids[0], tensors.routes.weights[0].to(x.dtype)
    inner = F.relu(x @ tensors.down[ids].flatten(0, 1).T) * weights.repeat_interleave(RANK)
    return torch.addmm(tensors.hidden_states[0], inner, tensors.up[ids].flatten(0, 1))[None]


def rivals(tensors: Inputs, device: torch.device) -> dict[str, figures.Call]:
    found: dict[str, figures.Call] = {
        "errata": lambda: apply_experts(*tensors[:4], norm=tensors.norm),
        "LiveEdit's einsums": lambda: liveedit(tensors),
        "two products": lambda: two_products(tensors),
    }
    if device.type == "cuda":
        compiled = torch.compile(two_products, dynamic=True)
        found["torch.compile"] = lambda: compiled(tensors)
    return found


def check(tensors: Inputs) -> None:
    unit = {torch.float32: 1e-4}.get(tensors.hidden_states.dtype, 5e-2)
    ours = apply_experts(*tensors[:4], norm=tensors.norm)
    torch.testing.assert_close(ours, liveedit(tensors), rtol=unit, atol=unit)


def measure(
    device: torch.device, limits: figures.Ceilings, rounds: int = 7
) -> Iterator[list[figures.Figure]]:
    with torch.no_grad():
        for case in cases(device):
            given = inputs(case, device)
            check(given)
            experts = 2 * case.num_chosen * RANK * case.width
            yield figures.compare(
                "experts",
                str(case),
                rivals(given, device),
                device,
                num_bytes=(2 * given.hidden_states.numel() + experts)
                * given.hidden_states.element_size(),
                num_flops=2 * case.num_tokens * experts,
                limits=limits,
                rounds=rounds,
                memory=True,
            )
        for pool in (1_000, 10_000) if device.type == "cpu" else (1_000, 10_000, 100_000):
            yield measure_routing(pool, device, limits, rounds)


def measure_routing(
    pool: int, device: torch.device, limits: figures.Ceilings, rounds: int
) -> list[figures.Figure]:
    """The routing of one sequence over a pool, a hundredth of which passes the gate."""
    generator = torch.Generator(device).manual_seed(0)
    vision_keys, query_keys = (
        torch.randn(pool, FEATURES, generator=generator, device=device) for _ in range(2)
    )
    vision, query = vision_keys[:1] * 0.1, query_keys[:1] * 0.1
    scale = 1 / math.sqrt(FEATURES)
    threshold = (vision @ vision_keys.T * scale).quantile(0.99, 1)

    def peer() -> tuple[Tensor, Tensor]:
        shape = (-1, 4, FEATURES // 4)
        seen = torch.einsum("bek,mek->bm", vision.view(shape), vision_keys.view(shape)) * scale
        chosen = (seen > threshold[:, None])[0]
        keys = query_keys.view(shape)[chosen]
        score = torch.einsum("bek,mek->bm", query.view(shape), keys) * scale
        return chosen.nonzero()[:, 0], score.softmax(1) * score.sigmoid()

    def ours() -> Routes:
        return route_experts(vision, query, threshold, vision_keys, query_keys, scale=scale)

    ids, weights = peer()
    routed = ours()
    assert torch.equal(routed.ids[0, : len(ids)], ids)
    torch.testing.assert_close(routed.weights[:, : len(ids)], weights, rtol=1e-4, atol=1e-6)
    return figures.compare(
        "route",
        f"M={pool} P={FEATURES} B=1 float32",
        {"errata": ours, "LiveEdit's einsums": peer},
        device,
        num_bytes=(pool + len(ids)) * FEATURES * 4,
        num_flops=2 * (pool + len(ids)) * FEATURES,
        limits=limits,
        rounds=rounds,
    )


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
@torch.no_grad()
def bench_experts(benchmark, case):
    given = inputs(case, DEVICE)
    check(given)
    figures.in_pytest(benchmark, "experts", str(case), rivals(given, DEVICE), DEVICE)
