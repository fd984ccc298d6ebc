"""The tolerance of parity tests: rounding passes, faults do not."""

from __future__ import annotations

import pytest
import torch

from tests.parity import assert_parity, tolerance


def test_sums_in_another_order_pass():
    for length in (16, 256, 4096):
        x = torch.randn(64, length)
        w = torch.randn(length)
        order = torch.randperm(length)
        assert_parity(x @ w, x[:, order] @ w[order], length=length)
        assert_parity(x @ w, (x.double() @ w.double()).float(), length=length)


@pytest.mark.parametrize("factor", [1 + 1e-4, -1.0, 0.0])
def test_a_fault_is_caught(factor):
    x = torch.randn(32)
    with pytest.raises(AssertionError):
        assert_parity(x * factor, x)
    shifted = x.roll(1)
    with pytest.raises(AssertionError):
        assert_parity(shifted, x, steps=8)


def test_scale_and_steps():
    assert tolerance(64, 8) == 8 * tolerance(64)
    big = torch.tensor([1e6, 1e-3])
    assert_parity(big + torch.tensor([0.5, 0.5]), big)  # rounding of the large entry
    with pytest.raises(AssertionError):
        assert_parity(big + torch.tensor([50.0, 0]), big)
    with pytest.raises(AssertionError):
        assert_parity(torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, 1.0]))
