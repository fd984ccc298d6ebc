"""Registration: every op has its twins, and none of them is needed to import the package."""

import doctest
import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from errata.kernels import custom_op

OPS = ["nearest", "route_experts", "apply_experts", "grouped_lora"]


def test_imports_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, errata.kernels as k\n"
        "assert k.nearest_key(torch.eye(2), torch.eye(2)).index.tolist() == [0, 1]\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('errata::nearest', 'CUDA'))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.strip() == "False", ran.stderr


def test_import_does_not_load_triton():
    script = "import sys, errata.kernels; print('triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.strip() == "False", ran.stderr


@pytest.mark.parametrize("op", OPS)
def test_the_twin_is_registered(op):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"errata::{op}", "CUDA") == (importlib.util.find_spec("triton") is not None)
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"errata::{op}", "CPU")


def test_every_example_runs():
    for name in ("codebook", "grouped_lora", "lora_moe"):
        module = importlib.import_module(f"errata.kernels.{name}")
        ran = doctest.testmod(module)
        assert ran.attempted > 0
        assert ran.failed == 0, name


@pytest.mark.parametrize("large", [1, 1 << 60], ids=["oneDNN", "BLAS"])
def test_affine_is_the_product(large, monkeypatch):
    monkeypatch.setattr(custom_op, "ONEDNN_MIN_MULTIPLICATIONS", large)
    rows, weight, bias = torch.randn(3, 40), torch.randn(70, 40), torch.randn(70)
    want = rows.double() @ weight.double().T
    torch.testing.assert_close(custom_op.affine(rows, weight).double(), want, rtol=1e-5, atol=1e-5)
    got = custom_op.affine(rows, weight[::2], bias[::2])
    torch.testing.assert_close(got.double(), (want + bias)[:, ::2], rtol=1e-5, atol=1e-5)
    assert custom_op.affine(rows[:0], weight).shape == (0, 70)
    assert custom_op.affine(rows, weight[:0]).shape == (3, 0)


def test_tensors_on_two_devices_are_refused():
    complaint = custom_op.device_mismatches("op", a=torch.ones(1), b=torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="op refuses its arguments: all tensors .* b on meta"):
        custom_op.raise_if_invalid("op", complaint)
