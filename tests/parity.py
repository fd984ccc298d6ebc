"""How far two correct fp32 programs may differ.

Two programs that compute the same sums in another order differ by rounding. A sum of n terms in
fp32 has a relative error of about eps * sqrt(n) (Higham 2002, section 4.2: the bound is n * eps,
the expectation under random signs its root). Errors are relative to the largest value of the
result, because small entries are differences of large ones. Each optimization step adds the error
of its own gradient to what it starts from, so the error grows linearly with the number of steps.
`SAFETY` covers the handful of sums that follow one another in a layer, and other processors'
instruction sets.

What the tests must catch is larger: a wrong sign, an off-by-one position or a missing term changes
results by 1e-2 and more; the smallest fault of the originals (WISE decays weights outside the mask)
by 1e-4 after six steps, where `tolerance(48, 6)` is 4e-5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["assert_parity", "tolerance"]

EPS = torch.finfo(torch.float32).eps
SAFETY = 8


def tolerance(length: int = 64, steps: int = 1) -> float:
    """Relative difference allowed after `steps` updates by sums of `length` terms."""
    return SAFETY * EPS * math.sqrt(length) * steps


def assert_parity(got: Tensor, want: Tensor, *, length: int = 64, steps: int = 1) -> None:
    """Assert that two tensors are equal up to fp32 rounding, relative to the largest value."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, must be {list(want.shape)}"
    assert got.dtype == want.dtype, f"dtype {got.dtype}, must be {want.dtype}"
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite]), "other infinite values"
    if not bool(finite.any()):
        return
    gap = float((got[finite].double() - want[finite].double()).abs().max())
    scale = max(float(want[finite].abs().max()), torch.finfo(torch.float32).tiny)
    allowed = tolerance(length, steps)
    assert gap <= allowed * scale, (
        f"largest difference {gap:.3g} at scale {scale:.3g}: {gap / scale:.2e}, allowed "
        f"{allowed:.2e}"
    )
