"""A step of AdamW on a stacked dense delta: pure, donated, donated with gradients in factors.

Run `pytest bench/perf/bench_optimizers.py`. 16 edits of a [768 3072] matrix: 151 MB each for the
delta, its gradient and two moments. "factors" includes forming each gradient, which the others are
given; "torch" is `torch.optim.AdamW(fused=True)` on one tensor of all edits.
"""

import pytest
import torch

from errata.functional.forward.grouped_linear import FactoredGradient
from errata.functional.gradients import optimizers

EDITS, OUT, IN, TOKENS = 16, 768, 3072, 4
LR, DECAY = 1e-3, 1e-2


def errata_optimizer(inplace):
    optimizer = optimizers.adamw(LR, weight_decay=DECAY, inplace=inplace)

    def start(tensor):
        return {"w": tensor}, optimizer.init({"w": tensor}, EDITS)

    def step(grad, tensors, state):
        return optimizer.update({"w": grad}, state, tensors)[0]["w"]

    return start, step


def torch_optimizer():
    def start(tensor):
        leaf = torch.nn.Parameter(tensor)
        return leaf, torch.optim.AdamW([leaf], lr=LR, weight_decay=DECAY, fused=True)

    def step(grad, leaf, optimizer):
        leaf.grad = grad
        optimizer.step()
        return leaf.detach()

    return start, step


PROVIDERS = {
    "pure": errata_optimizer(False),
    "donated": errata_optimizer(True),
    "factors": errata_optimizer(True),
    "torch": torch_optimizer(),
}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_adamw(benchmark, provider):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(EDITS, TOKENS, OUT, generator=generator)
    right = torch.randn(EDITS, TOKENS, IN, generator=generator)
    factors = FactoredGradient(left, right, torch.arange(EDITS))
    formed = factors.to_dense(EDITS)
    start, step = PROVIDERS[provider]
    grad = factors if provider == "factors" else formed

    got = step(grad, *start(torch.zeros(EDITS, OUT, IN)))
    first = -LR * formed / (formed.abs() + 1e-8)  # what AdamW's first step from zero is
    torch.testing.assert_close(got, first, rtol=1e-3, atol=1e-6)
    del got, first
    state = start(torch.zeros(EDITS, OUT, IN))
    benchmark.group = "adamw"
    benchmark.pedantic(step, (grad, *state), rounds=5, warmup_rounds=1)
