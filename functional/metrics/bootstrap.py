"""How sure a mean is: bootstrap over cases, and the paired test of two runs on the same cases."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Interval", "PairedTest", "bootstrap_interval", "paired_test"]

_MAX_VALUES = 4_000_000  # resampled values held at once: 32 MB of indices, 16 MB of counts


class Interval(NamedTuple):
    """A mean and its bootstrap interval; all NaN for no values."""

    mean: float
    low: float
    high: float
    count: int


class PairedTest(NamedTuple):
    """The mean difference of two runs on the same cases, its interval, and a two-sided p value."""

    difference: float
    low: float
    high: float
    p: float
    count: int


@lru_cache(maxsize=3)
def _resample_counts(count: int, draws: int, seed: int) -> Tensor:
    """How often each of `count` cases comes up in each resample: [draws, count], float32.

    The same for every mean over as many cases: a report has hundreds of those.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(
        count, (draws, count), generator=generator, dtype=torch.int64, device="cpu"
    )
    return torch.zeros(draws, count, dtype=torch.float32, device="cpu").scatter_add_(
        1, chosen, torch.ones((), dtype=torch.float32, device="cpu").expand_as(chosen)
    )


def _resampled_means(values: Tensor, draws: int, seed: int) -> Tensor:
    """Means of `draws` resamples with replacement of values [N] -> [draws]."""
    count = values.shape[0]
    if draws * count <= _MAX_VALUES:
        return (_resample_counts(count, draws, seed) @ values.float() / count).double()
    generator = torch.Generator().manual_seed(seed)
    means, step = [], max(1, _MAX_VALUES // count)
    for at in range(0, draws, step):
        chosen = torch.randint(
            count,
            (min(step, draws - at), count),
            generator=generator,
            dtype=torch.int64,
            device="cpu",
        )
        means.append(values[chosen].mean(-1))
    return torch.cat(means)


def bootstrap_interval(
    values: Tensor, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of values [N], one value per case.

    Cases are resampled whole, since probes of one case hang together. Deterministic for a seed.
    NaN values (a row that scores nothing) are left out and not counted.

    >>> bootstrap_interval(torch.tensor([1.0, 1.0, 1.0]))
    Interval(mean=1.0, low=1.0, high=1.0, count=3)

    Args:
        values: One value per case, [N].
        level: Coverage of the interval.
        draws: Resamples.
        seed: Seed of the resampling.

    Returns:
        Mean, bounds and the number of values.
    """
    values = values.double().flatten()
    values = values[~values.isnan()]
    if values.shape[0] == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    tail = (1 - level) / 2
    means = _resampled_means(values, draws, seed)
    low, high = torch.quantile(
        means, torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu")
    ).tolist()
    return Interval(float(values.mean()), low, high, values.shape[0])


def paired_test(
    one: Tensor, two: Tensor, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> PairedTest:
    """Compare two runs case by case: mean(two - one), bootstrap interval, sign-flip test.

    p = (1 + #{|mean(s d)| >= |mean(d)|}) / (1 + draws) over random signs s: exact under the
    hypothesis that the two runs are exchangeable on every case (Fisher's randomisation test).

    >>> paired_test(torch.zeros(8), torch.ones(8)).difference
    1.0

    Args:
        one: Values of the first run, one per case, [N].
        two: Values of the second run on the same cases, [N].
        level: Coverage of the interval.
        draws: Random sign flips.
        seed: Seed.

    Returns:
        Mean difference, interval, p value and the number of cases.
    """
    differences = (two - one).double().flatten()
    differences = differences[~differences.isnan()]
    count = differences.shape[0]
    if count == 0:
        nan = float("nan")
        return PairedTest(nan, nan, nan, nan, 0)
    interval = bootstrap_interval(differences, level, min(draws, 2000), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # only cases that differ can change sign; float error must not decide a tie
    nonzero, observed = differences[differences != 0], differences.sum().abs() - 1e-9
    step = max(1, _MAX_VALUES // max(1, nonzero.shape[0]))
    extreme = 0
    for at in range(0, draws, step):
        shape = (min(step, draws - at), nonzero.shape[0])
        signs = (
            torch.randint(2, shape, generator=generator, dtype=torch.int8, device="cpu").double()
            * 2
            - 1
        )
        extreme += int(((signs @ nonzero).abs() >= observed).sum())
    return PairedTest(
        interval.mean, interval.low, interval.high, (1 + extreme) / (1 + draws), count
    )
