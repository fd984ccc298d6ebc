"""The Triton twins against their definitions, on awkward shapes, in poisoned memory.

Without a GPU they run in Triton's interpreter; what the compiler makes of them is `test_aot.py`.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from errata.kernels import square_norms
from errata.kernels.codebook import ref as codebook_ref
from errata.kernels.codebook import triton as codebook
from errata.kernels.grouped_lora import ref as grouped_ref
from errata.kernels.grouped_lora import triton as grouped
from errata.kernels.lora_moe import ref as moe_ref
from errata.kernels.lora_moe import triton as moe
from tests.parity import assert_parity

pytest.importorskip("triton", reason="the twins need Triton, an optional dependency")


# NaN and infinity are put in on purpose, and NumPy, inside the interpreter, says so.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_keys", "num_rows", "width"),
    [(0, 2, 8), (1, 1, 1), (128, 1, 64), (129, 17, 40), (300, 3, 33)],
)
def test_nearest(num_keys, num_rows, width, dtype, normal, surrounded):
    query = surrounded(normal(num_rows, width, dtype=dtype))
    keys = surrounded(normal(num_keys, width, dtype=dtype))
    if num_keys > 2:
        keys[num_keys // 2] = keys[0]
        keys[-1] = query[0]
    norms, reach = square_norms(keys), torch.full_like(query[:, 0], math.inf).float()
    want = codebook_ref.nearest(query, keys, norms, reach)
    got = codebook.nearest(query, keys, norms, reach)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)


def test_nearest_of_broken_deleted_and_far_ones(normal):
    query, keys = normal(6, 20), normal(300, 20)
    keys[::2, 3] = torch.tensor([math.nan, math.inf, -math.inf] * 50)
    query[1, 7], query[2] = math.nan, 1e6
    alive = torch.rand(300, device=keys.device) > 0.5
    norms = square_norms(keys, alive)
    reach = torch.tensor([math.inf, math.inf, 9.0, 4.0, -1.0, 0.0], device=keys.device)
    want = codebook_ref.nearest(query, keys, norms, reach)
    got = codebook.nearest(query, keys, norms, reach)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0, equal_nan=True)
    nothing = codebook.nearest(query[3:], keys, torch.full_like(norms, math.inf), reach[3:])
    assert nothing[0].tolist() == [-1] * 3
    assert nothing[1].tolist() == [math.inf] * 3


def test_nearest_tells_near_duplicates_apart(normal):
    centre = normal(1, 48) * 60
    keys = centre + 0.03 * normal(260, 48)
    query = centre + 0.03 * normal(16, 48)
    index = (query.double()[:, None] - keys.double()[None]).norm(dim=-1).argmin(1)
    reach = torch.full_like(query[:, 0], math.inf)
    assert torch.equal(codebook.nearest(query, keys, square_norms(keys), reach)[0], index)
    assert (torch.cdist(query, keys).argmin(1) != index).any()


def test_nearest_alone_and_in_slices_is_the_same_bits(normal, monkeypatch):
    query, keys = normal(18, 24), normal(200, 24)
    reach = torch.full_like(query[:, 0], math.inf)
    whole = codebook.nearest(query, keys, square_norms(keys), reach)
    monkeypatch.setattr(codebook_ref, "MINIMA", 10)  # five queries at a time
    for part, again in zip(whole, codebook.nearest(query, keys, square_norms(keys), reach)):
        assert torch.equal(part, again)


def test_nearest_of_mixed_dtypes(normal):
    query, keys = normal(5, 24), normal(150, 24, dtype=torch.bfloat16)
    reach = torch.full_like(query[:, 0], math.inf)
    want = codebook_ref.nearest(query, keys, square_norms(keys), reach)
    assert torch.equal(codebook.nearest(query, keys, square_norms(keys), reach)[0], want[0])


def test_nearest_beyond_two_to_the_31():
    """In its own process: a 32-bit offset would read outside of the memory and end it."""
    script = (
        "import torch; from errata.kernels.codebook import triton as t\n"
        "keys = torch.empty(3 * 2**30 + 64, dtype=torch.float16).as_strided((4, 16), (2**30, 1))\n"
        "keys.copy_(torch.arange(4.0)[:, None].expand(4, 16))\n"
        "norms = keys.float().square().sum(1)\n"
        "print(t.nearest(keys.contiguous(), keys, norms, torch.ones(4))[0].tolist())\n"
    )
    surroundings = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert ran.stdout.strip() == "[0, 1, 2, 3]", ran.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_experts", "num_rows", "width"),
    [(0, 2, 8), (1, 1, 8), (65, 17, 33), (1030, 2, 16)],
)
def test_route(num_experts, num_rows, width, dtype, normal):
    vision, query = normal(num_rows, width, dtype=dtype), normal(num_rows, width + 1, dtype=dtype)
    vision_keys = normal(num_experts, width, dtype=dtype)
    query_keys = normal(num_experts, width + 1, dtype=dtype)
    alive = torch.rand(num_experts, device=vision.device) > 0.2
    threshold = normal(num_rows)
    threshold[0] = 1e9  # nobody
    if num_experts > 9:
        vision_keys[3], query_keys[5] = math.nan, math.inf
    args = (vision, query, threshold, vision_keys, query_keys, alive, 0.3)
    want, got = moe_ref.route_experts(*args), moe.route_experts(*args)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[2], want[2])
    assert_parity(got[1], want[1])


def choices(num_experts, num_rows, num_slots, device):
    """Random ascending experts per row, some rows with none."""
    ids = torch.stack([torch.randperm(num_experts)[:num_slots].sort()[0] for _ in range(num_rows)])
    count = torch.randint(0, num_slots + 1, (num_rows,))
    count[0] = num_slots
    live = torch.arange(num_slots) < count[:, None]
    weights = torch.where(live, torch.rand(num_rows, num_slots), 0.0)
    return [part.to(device) for part in (torch.where(live, ids, -1), weights, count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["none", "scale", "scale and shift"])
@pytest.mark.parametrize(
    ("num_tokens", "num_slots", "rank", "width"),
    [(1, 1, 4, 16), (7, 6, 3, 33), (65, 17, 4, 40)],
)
def test_experts(num_tokens, num_slots, rank, width, norm, dtype, normal, surrounded, device):
    num_rows, num_experts = 3, num_slots + 2
    hidden = surrounded(normal(num_rows, num_tokens, width, dtype=dtype))
    down = surrounded(normal(num_experts, rank, width, dtype=dtype))
    up = surrounded(normal(num_experts, rank, width, dtype=dtype))
    routed = choices(num_experts, num_rows, num_slots, device)
    lengths = torch.randint(0, num_tokens + 1, (num_rows,)).to(device)
    lengths[0] = num_tokens
    gamma = None if norm == "none" else normal(width)
    beta = normal(width) if norm == "scale and shift" else None
    args = (hidden, down, up, *routed, lengths, gamma, beta, 1e-5, "relu")
    want, got = moe_ref.apply_experts(*args), moe.apply_experts(*args)
    unit = UNIT[dtype]
    torch.testing.assert_close(got, want, rtol=unit, atol=unit * float(want.float().abs().max()))
    for row, (count, length) in enumerate(zip(routed[2].tolist(), lengths.tolist())):
        untouched = length if count else 0
        assert torch.equal(got[row, untouched:], hidden[row, untouched:])


def test_experts_in_slices_are_summed_before_they_are_rounded(normal, device, monkeypatch):
    hidden, down, up = normal(2, 5, 16), normal(9, 2, 16), normal(9, 2, 16)
    routed = choices(9, 2, 9, device)
    routed[2][1] = 4
    lengths = torch.tensor([5, 3], device=device)
    args = (down, up, *routed, lengths, None, None, 1e-5, "identity")
    want = moe_ref.apply_experts(hidden, *args)
    monkeypatch.setattr(grouped, "INNER", 2 * 5 * 2 * 4)  # four slots at a time
    torch.testing.assert_close(moe.apply_experts(hidden, *args), want, rtol=1e-5, atol=1e-5)
    half = moe.apply_experts(hidden.half(), *args)
    want = moe_ref.apply_experts(hidden.half(), *args)
    torch.testing.assert_close(half, want, rtol=1e-3, atol=1e-3)


def test_a_broken_expert_reaches_only_those_who_chose_it(normal, device):
    hidden, down, up = normal(3, 4, 8), normal(4, 2, 8), normal(4, 2, 8)
    down[0], up[3] = math.nan, math.nan
    hidden[2, 0, 0] = -0.0
    ids = torch.tensor([[1, 2], [3, -1], [-1, -1]], device=device)
    count = torch.tensor([2, 1, 0], device=device)
    lengths = torch.full_like(count, 4)
    routed = (ids, (ids >= 0).float(), count)
    got = moe.apply_experts(hidden, down, up, *routed, lengths, None, None, 1e-5, "relu")
    assert got[0].isfinite().all()
    assert got[1].isnan().all()
    assert torch.equal(got[2].view(torch.int32), hidden[2].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "widths", "num_edits", "rank"),
    [(1, 1, (8, 8), 1, 1), (4, 5, (33, 17), 3, 3), (2, 65, (16, 40), 2, 17), (2, 3, (8, 8), 0, 2)],
)
def test_grouped_lora(
    num_rows, num_tokens, widths, num_edits, rank, based, dtype, normal, surrounded, device
):
    x = surrounded(normal(num_rows, num_tokens, widths[0], dtype=dtype))
    down = surrounded(normal(num_edits, rank, widths[0], dtype=dtype))
    up = surrounded(normal(num_edits, widths[1], rank, dtype=dtype))
    base = surrounded(normal(num_rows, num_tokens, widths[1], dtype=dtype)) if based else None
    edit = torch.randint(-1, num_edits, (num_rows,)).to(device)
    want = grouped_ref.grouped_lora(x, down, up, edit, base)
    got = grouped.grouped_lora(x, down, up, edit, base)
    unit = UNIT[dtype]
    torch.testing.assert_close(got, want, rtol=unit, atol=unit * float(want.float().abs().max()))
