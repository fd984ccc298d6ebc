"""The nearest key: exact, the same bits alone and in a batch, and open to every transform."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.func import grad, jacrev, jvp, vjp, vmap

from errata.kernels import KeyLookup, custom_op, lookup_key, nearest_key, replace_hits, square_norms
from errata.kernels.codebook import ref

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = [(1, 1, 1), (15, 5, 16), (16, 2, 33), (17, 3, 40), (300, 65, 72)]  # N B D
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def oracle(query, keys):
    """Distances [B N] in float64."""
    return (query.double()[:, None] - keys.double()[None]).norm(dim=-1)


def clusters(norm, num_clusters=12, copies=10, width=512):
    """Groups of near-duplicate keys far from the origin, and queries beside some of them."""
    centres = torch.randn(num_clusters, width) + torch.randn(width) * norm / math.sqrt(width)
    if norm > 400:
        centres[:, :2] += 300  # the massive dimensions of real activations
    keys = centres.repeat_interleave(copies, 0)
    spread = 0.35 / math.sqrt(2 * width)
    extra = keys + spread * torch.randn_like(keys)
    keys = keys + spread * torch.randn_like(keys)
    return torch.cat([extra, keys[:40]]), keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_keys", "num_rows", "width"), SHAPES)
def test_nearest_is_exact(num_keys, num_rows, width, dtype):
    query, keys = torch.randn(num_rows, width).to(dtype), torch.randn(num_keys, width).to(dtype)
    distance, index = oracle(query, keys).min(1)
    got = nearest_key(query, keys)
    assert torch.equal(got.index, index)
    torch.testing.assert_close(got.distance.double(), distance, rtol=1e-7, atol=0)


@pytest.mark.parametrize("norm", [50, 140, 450])
@pytest.mark.parametrize("large", [1, custom_op.ONEDNN_MIN_MULTIPLICATIONS], ids=["oneDNN", "BLAS"])
def test_near_duplicates_are_told_apart_where_cdist_fails(norm, large, monkeypatch):
    monkeypatch.setattr(custom_op, "ONEDNN_MIN_MULTIPLICATIONS", large)
    query, keys = clusters(norm)
    distance, index = oracle(query, keys).min(1)
    got = nearest_key(query, keys)
    assert torch.equal(got.index, index)
    torch.testing.assert_close(got.distance.double(), distance, rtol=1e-6, atol=0)
    assert (got.distance[-40:] == 0).all(), "a query equal to a key has distance zero"
    peer = torch.cdist(query, keys)
    assert (peer.argmin(1) != index).any()
    assert (peer.amin(1) - distance).abs().max() > 1e-3


def test_ties_go_to_the_lowest_index():
    keys = torch.randn(5, 24)[torch.tensor([3, 1, 2, 1, 0] * 40)]
    got = nearest_key(keys, keys)
    assert torch.equal(got.index[:5], torch.tensor([0, 1, 2, 1, 4]))
    assert nearest_key(torch.zeros(3, 8), torch.ones(200, 8)).index.tolist() == [0, 0, 0]


def test_alone_and_in_a_batch_are_the_same_bits(monkeypatch):
    query, keys = clusters(140)
    radii = torch.rand(len(keys))
    whole = lookup_key(query, keys, radii)
    alone = [lookup_key(one[None], keys, radii) for one in query]
    for part, parts in zip(whole, zip(*alone)):
        assert torch.equal(part, torch.cat(parts))
    for name in ("SCORES", "MINIMA", "COPIED"):
        monkeypatch.setattr(ref, name, 1 << 11)
        for part, again in zip(whole, lookup_key(query, keys, radii)):
            assert torch.equal(part, again), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_key_that_is_not_usable_is_never_chosen(bad):
    query, keys = torch.randn(6, 20), torch.randn(50, 20)
    broken = keys.clone()
    broken[::2, 3] = bad
    want = oracle(query, keys[1::2]).min(1)
    got = nearest_key(query, broken)
    assert torch.equal(got.index, want.indices * 2 + 1)
    none = nearest_key(query, torch.full((40, 20), bad))
    assert none.index.tolist() == [-1] * 6
    assert none.distance.tolist() == [math.inf] * 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_query_that_is_not_finite_misses_and_says_so(bad):
    query, keys = torch.randn(3, 20), torch.randn(50, 20)
    query[1, 7] = bad
    got = lookup_key(query, keys, torch.full((50,), 1e6))
    assert got.index[1] == -1
    assert got.distance[1].isnan()
    assert got.hit.tolist() == [True, False, True]


def test_deleted_keys_are_as_if_absent():
    query, keys, alive = torch.randn(9, 12), torch.randn(70, 12), torch.rand(70) > 0.5
    kept = alive.nonzero()[:, 0]
    want = nearest_key(query, keys[kept])
    for got in (
        nearest_key(query, keys, is_active=alive),
        nearest_key(query, keys, norms=square_norms(keys, alive)),
    ):
        assert torch.equal(got.index, kept[want.index])
        assert torch.equal(got.distance, want.distance)


@pytest.mark.parametrize(("num_keys", "num_rows"), [(0, 3), (5, 0), (0, 0)])
def test_nothing_to_search(num_keys, num_rows):
    got = lookup_key(torch.randn(num_rows, 8), torch.randn(num_keys, 8), torch.ones(num_keys))
    assert got.index.tolist() == [-1] * num_rows
    assert not got.hit.any()
    hidden = torch.randn(num_rows, 2, 4)
    assert torch.equal(replace_hits(hidden, got, torch.randn(num_keys, 4)), hidden)


def test_only_the_radius_of_the_nearest_key_counts():
    keys = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    got = lookup_key(torch.tensor([[1.0, 0.0], [0.5, 0.0]]), keys, torch.tensor([0.5, 9.0]))
    assert got.index.tolist() == [0, 0]
    assert got.hit.tolist() == [False, True]  # at 0.5: the boundary belongs to the ball


def test_a_radius_that_is_nan_or_negative_covers_nothing():
    keys = torch.eye(3)
    got = lookup_key(keys, keys, torch.tensor([math.nan, -1.0, 0.0]))
    assert got.hit.tolist() == [False, False, True]


def test_a_key_beyond_reach_counts_as_absent():
    query, keys = torch.randn(30, 16), torch.randn(200, 16)
    full = nearest_key(query, keys)
    near = full.distance <= full.distance.median()
    got = nearest_key(query, keys, max_distance=float(full.distance.median()))
    assert torch.equal(got.index, torch.where(near, full.index, -1))
    assert torch.equal(got.distance, torch.where(near, full.distance, math.inf))


def test_lookup_agrees_with_grace():
    golden = load_file(GOLDEN / "grace_adapter_replace_prompt.safetensors")
    for step in range(7):
        keys, values, radii = (golden[f"s{step}.{n}"] for n in ("keys", "values", "epsilons"))
        found = lookup_key(golden["q"][step : step + 1], keys, radii)
        assert torch.equal(found.index, golden[f"s{step}.chosen_key"])
        want = golden[f"s{step}.out"]  # [1 3 4]; the last token is not replaced
        plain = torch.zeros_like(want)
        plain[:, -1] = want[:, -1]
        where = torch.tensor([[True, True, False]])
        assert torch.equal(replace_hits(plain, found, values, where), want)


def test_replace_is_differentiable_and_local():
    found = KeyLookup(torch.tensor([1, 0]), torch.zeros(2), torch.tensor([True, False]))
    hidden, values = torch.randn(2, 3, 4), torch.randn(2, 4)
    where = torch.tensor([[True, False, True], [True, True, True]])
    to_hidden, to_values = grad(lambda h, v: replace_hits(h, found, v, where).sum(), (0, 1))(
        hidden, values
    )
    assert to_values.tolist() == [[0.0] * 4, [2.0] * 4]
    assert to_hidden[..., 0].tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


def loss(query, keys, values, hidden):
    found = lookup_key(query, keys, torch.full_like(keys[:, 0], 5.0))
    return replace_hits(hidden, found, values).square().sum() + query.sum()


@pytest.fixture
def arguments():
    return torch.randn(4, 8), torch.randn(7, 8), torch.randn(7, 3), torch.randn(4, 2, 3)


@pytest.mark.parametrize("batched", [(0,), (1,), (2,), (3,), (0, 1), (0, 1, 2, 3)], ids=str)
def test_vmap_is_a_loop(arguments, batched):
    many = [
        torch.randn(5, *tensor.shape) if place in batched else tensor
        for place, tensor in enumerate(arguments)
    ]
    dims = tuple(0 if place in batched else None for place in range(4))
    one_by_one = [
        [tensor[i] if place in batched else tensor for place, tensor in enumerate(many)]
        for i in range(5)
    ]
    got = vmap(loss, dims)(*many)
    torch.testing.assert_close(got, torch.stack([loss(*one) for one in one_by_one]))
    got = vmap(grad(loss, (0, 2, 3)), dims)(*many)
    want = [grad(loss, (0, 2, 3))(*one) for one in one_by_one]
    for part, parts in zip(got, zip(*want)):
        torch.testing.assert_close(part, torch.stack(parts))


def test_vmap_inside_vmap():
    query, keys = torch.randn(2, 3, 4, 8), torch.randn(2, 9, 8)
    got = vmap(lambda q, k: vmap(lambda one: nearest_key(one, k))(q))(query, keys)
    want = [[nearest_key(q, k).index for q in qs] for qs, k in zip(query, keys)]
    assert torch.equal(got.index, torch.stack([torch.stack(row) for row in want]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_reverse_and_forward_mode_agree(arguments):
    gradient = grad(loss, (0, 1, 2, 3))(*arguments)
    _, pull = vjp(loss, *arguments)
    jacobian = jacrev(loss, (0, 1, 2, 3))(*arguments)
    for a, b, c in zip(gradient, pull(torch.tensor(1.0)), jacobian):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
    _, push = jvp(loss, arguments, gradient)
    torch.testing.assert_close(push, sum(part.square().sum() for part in gradient))


def test_compiles_whole(arguments):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))


@pytest.mark.parametrize(("num_keys", "num_rows"), [(7, 3), (0, 3), (7, 0)])
def test_op_is_well_registered(num_keys, num_rows):
    keys = torch.randn(num_keys, 5)
    args = (torch.randn(num_rows, 5), keys, square_norms(keys), torch.full((num_rows,), math.inf))
    torch.library.opcheck(torch.ops.errata.nearest.default, args)


def test_what_does_not_fit_is_refused_all_at_once():
    with pytest.raises(
        ValueError, match=r"keys must be \[N 4\].*; is_active must be \[6\], got \[5\]"
    ):
        nearest_key(torch.randn(2, 4), torch.randn(6, 3), is_active=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"radii must be \[6\], got \[7\]"):
        lookup_key(torch.randn(2, 4), torch.randn(6, 4), torch.ones(7))
    found = lookup_key(torch.randn(2, 4), torch.randn(6, 4), torch.ones(6))
    with pytest.raises(ValueError, match=r"values must be \[N 3\].*token_mask must be \[2, 1\]"):
        replace_hits(torch.randn(2, 1, 3), found, torch.randn(6, 5), torch.ones(2, 2))
