"""Shared by the kernel tests: uninitialised memory holds NaN, inputs lie in NaN."""

import pytest
import torch

GPU = torch.cuda.is_available()


@pytest.fixture
def device():
    """Where the Triton twins run: a GPU, or a CPU through Triton's interpreter."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def poison():
    """Every `torch.empty` comes filled with NaN (integers: the largest)."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def surrounded():
    """Copy a tensor into the middle of a larger one of NaN: a stray read shows in the result."""

    def surround(tensor):
        margin = [size + 3 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 5]
        large = torch.full(margin, float("nan"), dtype=tensor.dtype, device=tensor.device)
        inner = large[tuple(slice(1, 1 + size) for size in tensor.shape)]
        return inner.copy_(tensor)

    return surround


@pytest.fixture
def normal(device):
    """Seeded normal tensors on the twins' device, of any floating dtype."""

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(device, dtype)

    return draw
