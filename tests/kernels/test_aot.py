"""What the compiler makes of the kernels for sm_80 and sm_90: no GPU is needed to ask."""

import os
import subprocess
import sys

import msgspec
import pytest

pytest.importorskip("triton", reason="the twins need Triton, an optional dependency")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    # Its own process: in the interpreter's there are no kernels to compile.
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    surroundings["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [
        sys.executable,
        "-m",
        "errata.bench.perf.ahead_of_time",
        str(folder / "aot.json"),
        "bf16",
        "fp32",
    ]
    ran = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    report = folder / "aot.json"
    assert report.exists(), ran.stderr
    return msgspec.json.decode(report.read_bytes())


def test_every_kernel_is_compiled_for_both(rows):
    kernels = {"tile_minima", "rescan", "score_experts", "compact_routes"}
    kernels |= {"row_moments", "shrink", "expand"}
    for arch in ("sm_80", "sm_90"):
        assert {row["kernel"] for row in rows if row["arch"] == arch} == kernels


def test_nothing_spills_and_everything_fits(rows):
    bad = [r for r in rows if r["spilled_bytes"] or r["shared_bytes"] > r["shared_limit"]]
    assert not bad, bad


def test_products_run_on_tensor_cores(rows):
    products = {"tile_minima", "score_experts", "shrink", "expand"}
    bad = [r for r in rows if r["kernel"] in products and not r["tensor_instructions"]]
    assert not bad, bad
