"""Bootstrap intervals cover, paired tests tell runs apart, both are deterministic."""

import pytest
import torch

from errata.functional.metrics.bootstrap import bootstrap_interval, paired_test


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    runs = (torch.rand(200, 60, generator=generator) < 0.7).double()
    covered = [low <= 0.7 <= high for _, low, high, _ in map(bootstrap_interval, runs)]
    assert 0.88 <= sum(covered) / len(covered) <= 0.99  # nominal 0.95, n = 60


def test_nan_and_nothing():
    assert bootstrap_interval(torch.tensor([1.0, float("nan")])).count == 1
    empty = bootstrap_interval(torch.tensor([]))
    assert empty.count == 0
    assert empty.mean != empty.mean


def test_same_seed_same_interval():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


def test_large_inputs_are_resampled_in_pieces():
    out = bootstrap_interval(torch.arange(30_000) % 2 * 1.0, draws=200)
    assert out.low < 0.5 < out.high
    assert out.high - out.low < 0.02


def test_paired_finds_a_small_steady_difference_and_no_difference_in_noise():
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(80, generator=generator)
    better = paired_test(one, one + 0.05 + 0.1 * torch.rand(80, generator=generator))
    assert better.p < 0.001
    assert better.low > 0
    same = paired_test(one, one[torch.randperm(80, generator=generator)])
    assert same.p > 0.05
    assert same.low < 0 < same.high


def test_paired_is_exact_on_a_case_that_can_be_counted():
    # 5 of 5 cases moved the same way: 2 of 32 sign patterns are as extreme
    out = paired_test(torch.zeros(5), torch.ones(5), draws=20_000)
    assert out.p == pytest.approx(2 / 32, abs=0.01)
    assert paired_test(torch.ones(4), torch.ones(4)).p == 1.0
