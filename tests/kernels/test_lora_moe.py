"""Expert routing and application: LiveEdit's numbers, no expert reaches whom it should not."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import grad, jvp, vjp, vmap

from errata.kernels import Routes, apply_experts, expert_weights, route_experts
from tests.parity import assert_parity

GOLDEN = Path(__file__).parents[1] / "golden"


def pool(num_experts=6, rank=2, width=8):
    return torch.randn(num_experts, rank, width), torch.randn(num_experts, rank, width)


def routes(*rows, num_slots=None):
    """Routes from one list of ids per sequence, with weights 0.1, 0.2, ... by expert."""
    num_slots = num_slots or max(map(len, rows))
    ids = torch.full((len(rows), num_slots), -1)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    weights = torch.where(ids >= 0, (ids + 1) / 10, 0.0)
    return Routes(ids, weights, torch.tensor([len(row) for row in rows]))


def peer(hidden, down, up, routed, norm=None, activation=F.relu):
    """LiveEdit's own einsums in float64, one sequence after another."""
    out = hidden.double().clone()
    for row, count in enumerate(routed.count.tolist()):
        ids, weights = routed.ids[row, :count], routed.weights[row, :count].double()
        x = hidden[row].double()
        if norm is not None:
            bias = None if norm[1] is None else norm[1].double()
            x = F.layer_norm(x, x.shape[-1:], norm[0].double(), bias)
        inner = activation(torch.einsum("ld,mrd->lmr", x, down[ids].double()))
        out[row] += torch.einsum("lmr,mrd,m->ld", inner, up[ids].double(), weights)
    return out


def test_agrees_with_liveedit():
    golden = load_file(GOLDEN / "liveedit_route_N5.safetensors")
    vision_keys, query_keys = golden["pool.evr"].flatten(1), golden["pool.eqr"].flatten(1)
    norm = golden["instant_reps_norm.weight"], golden["instant_reps_norm.bias"]
    scale = 1 / (4 * math.sqrt(32))
    for number in range(4):
        part = {k[3:]: v for k, v in golden.items() if k.startswith(f"q{number}.")}
        vision, query = part["ivr"].flatten(1), part["iqr"].flatten(1)
        threshold = part["vis_sim_prot"][:, 0]
        routed = route_experts(vision, query, threshold, vision_keys, query_keys, scale=scale)
        count = len(part["selected"])
        assert routed.count.tolist() == [count]
        assert torch.equal(routed.ids[0, :count], part["selected"])
        torch.testing.assert_close(routed.weights[:, :count], part["fuse_coe"])
        got = apply_experts(
            part["reps"], golden["pool.moe_c"], golden["pool.moe_r"], routed, norm=norm
        )
        assert_parity(got, part["reps"] + part["residual"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_experts", "num_rows"), [(0, 2), (1, 1), (33, 5), (5, 0)])
def test_route_equals_its_formula(num_experts, num_rows, dtype):
    vision, query = torch.randn(2, num_rows, 24, dtype=dtype)
    vision_keys, query_keys = torch.randn(2, num_experts, 24, dtype=dtype)
    threshold = torch.randn(num_rows) * 0.2
    got = route_experts(vision, query, threshold, vision_keys, query_keys, scale=0.1)
    similarity = vision.double() @ vision_keys.double().T * 0.1
    scores = query.double() @ query_keys.double().T * 0.1
    for row in range(num_rows):
        ids = (similarity[row] > threshold[row]).nonzero()[:, 0]
        want = scores[row, ids].softmax(0) * scores[row, ids].sigmoid()
        count = len(ids)
        assert got.count[row] == count
        assert got.ids[row].tolist() == ids.tolist() + [-1] * (num_experts - count)
        torch.testing.assert_close(got.weights[row, :count].double(), want, rtol=1e-5, atol=1e-7)
        assert not got.weights[row, count:].any()


def test_the_gate_is_strict():
    key = torch.ones(1, 4)
    for threshold, count in [(4.0, 0), (3.99, 1)]:
        assert route_experts(key, key, torch.tensor([threshold]), key, key).count.tolist() == [
            count
        ]


def test_one_expert_weighs_its_sigmoid():
    query = torch.randn(3, 4)
    got = route_experts(query, query, torch.full((3,), -math.inf), query[:1], query[:1])
    torch.testing.assert_close(got.weights, (query @ query[:1].T).sigmoid())


def test_far_scores_do_not_overflow():
    query = torch.tensor([[1.0], [-1.0]])
    got = route_experts(
        query, query, torch.full((2,), -1e9), torch.zeros(2, 1), torch.tensor([[3e4], [1]])
    )
    assert got.weights.isfinite().all()
    torch.testing.assert_close(got.weights[:, :2].sum(1), torch.tensor([1.0, 1 / (1 + math.e)]))


def test_deleted_experts_are_as_if_absent():
    vision, keys, alive = torch.randn(4, 8), torch.randn(20, 8), torch.rand(20) > 0.4
    kept = alive.nonzero()[:, 0]
    got = route_experts(vision, vision, torch.zeros(4), keys, keys, is_active=alive)
    want = route_experts(vision, vision, torch.zeros(4), keys[kept], keys[kept])
    slots = len(kept)
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.ids[:, :slots], torch.where(want.ids >= 0, kept[want.ids], -1))
    torch.testing.assert_close(got.weights[:, :slots], want.weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_expert_that_is_not_finite_is_not_chosen(bad):
    vision, keys = torch.randn(4, 8), torch.randn(6, 8)
    vision_keys, query_keys = keys.clone(), keys.clone()
    query_keys[2, 1] = bad
    got = route_experts(vision, vision, torch.full((4,), -1e9), vision_keys, query_keys)
    assert got.ids[:, :5].tolist() == [[0, 1, 3, 4, 5]] * 4
    vision_keys[2, 1] = math.nan
    again = route_experts(vision, vision, torch.full((4,), -1e9), vision_keys, keys)
    assert torch.equal(got.ids, again.ids)
    assert again.weights.isfinite().all()


def test_top_k_keeps_the_heaviest():
    vision, keys = torch.randn(5, 8), torch.randn(20, 8)
    full = route_experts(vision, vision, torch.zeros(5), keys, keys)
    got = route_experts(vision, vision, torch.zeros(5), keys, keys, top_k=3)
    assert got.ids.shape == (5, 3)
    for row in range(5):
        count = int(full.count[row])
        best = full.weights[row, :count].topk(min(3, count)).indices.sort()[0]
        assert got.ids[row, : len(best)].tolist() == full.ids[row, best].tolist()
        assert torch.equal(got.weights[row, : len(best)], full.weights[row, best])
        assert got.count[row] == len(best)
    tied = route_experts(
        vision[:1],
        vision[:1],
        torch.tensor([-1e9]),
        keys[:1].expand(4, 8),
        keys[:1].expand(4, 8),
        top_k=2,
    )
    assert tied.ids.tolist() == [[0, 1]]
    assert route_experts(vision, vision, torch.zeros(5), keys, keys, top_k=99).ids.shape == (5, 20)


def test_weigh_has_the_gradient_of_its_formula():
    scores, gate = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5) > 0.3
    gate[1] = False
    scores[0, 0], gate[0, 0] = math.nan, False

    def plain(scores):
        rows = [row[keep].softmax(0) * row[keep].sigmoid() for row, keep in zip(scores, gate)]
        return torch.cat(rows).square().sum()

    got = grad(lambda s: expert_weights(s, gate).square().sum())(scores)
    torch.testing.assert_close(got, grad(plain)(scores))
    assert not expert_weights(scores, gate)[1].any()


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("norm", ["none", "scale", "scale and shift"])
def test_apply_equals_the_peers_einsum(mode, activation, norm):
    hidden, (down, up) = torch.randn(3, 5, 8), pool()
    routed = routes([0, 2, 5], [], [1], num_slots=6)
    norm = {
        "none": None,
        "scale": (torch.randn(8), None),
        "scale and shift": (torch.randn(8), torch.randn(8)),
    }[norm]
    act = F.relu if activation == "relu" else (lambda x: x)
    with torch.set_grad_enabled(mode == "grad"):
        got = apply_experts(hidden, down, up, routed, norm=norm, activation=activation)
    want = peer(hidden, down, up, routed, norm, act).float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_apply_rounds_once(dtype):
    hidden, (down, up) = torch.randn(2, 4, 8).to(dtype), pool(40)
    routed = routes(range(40), [3])
    with torch.no_grad():
        got = apply_experts(hidden, down.to(dtype), up.to(dtype), routed)
    want = peer(hidden, down.to(dtype), up.to(dtype), routed)
    unit = torch.finfo(dtype).eps / 2
    assert ((got.double() - want).abs() <= unit * want.abs() * 1.001 + 1e-4).all()


@pytest.mark.parametrize("enabled", [True, False])
def test_what_has_no_expert_keeps_its_bits(enabled):
    hidden, (down, up) = torch.randn(3, 4, 8), pool()
    hidden[1, 0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    lengths = torch.tensor([2, 4, 0])
    with torch.set_grad_enabled(enabled):
        got = apply_experts(hidden, down, up, routes([1], [], [2]), lengths=lengths)
        empty = apply_experts(hidden, down[:0], up[:0], routes([], [], [], num_slots=3))
    assert torch.equal(got[1].view(torch.int32), hidden[1].view(torch.int32))
    assert torch.equal(got[0, 2:], hidden[0, 2:])
    assert torch.equal(got[2], hidden[2])
    assert (got[0, :2] != hidden[0, :2]).any()
    assert torch.equal(empty.view(torch.int32), hidden.view(torch.int32))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_broken_expert_reaches_only_those_who_chose_it(enabled):
    hidden, (down, up) = torch.randn(3, 4, 8), pool()
    for broken in (0, 3):
        down[broken], up[broken] = math.nan, math.inf
    with torch.set_grad_enabled(enabled):
        got = apply_experts(hidden, down, up, routes([1, 2], [3], [], num_slots=6))
    assert got[0].isfinite().all()
    assert got[1].isnan().all()
    assert torch.equal(got[2], hidden[2])


def test_order_of_experts_does_not_matter():
    hidden, (down, up) = torch.randn(1, 4, 8), pool()
    order = torch.randperm(6)
    routed = routes(range(6))
    moved = Routes(order[None], routed.weights[:, order], routed.count)
    torch.testing.assert_close(
        apply_experts(hidden, down, up, moved), apply_experts(hidden, down, up, routed)
    )


def test_a_batch_is_its_sequences():
    hidden, (down, up) = torch.randn(3, 4, 8), pool()
    routed = routes([0, 2, 5], [4], [1, 3])
    with torch.no_grad():
        whole = apply_experts(hidden, down, up, routed)
        for row in range(3):
            one = Routes(*(part[row : row + 1] for part in routed))
            alone = apply_experts(hidden[row : row + 1], down, up, one)
            torch.testing.assert_close(whole[row : row + 1], alone)


ROUTED = routes([0, 2, 5], [], [1], num_slots=4)


def loss(hidden, down, up, weights):
    routed = ROUTED._replace(weights=weights)
    return apply_experts(hidden, down, up, routed, norm=(torch.ones(8), None)).square().sum()


def test_gradient_is_that_of_the_peers_einsum():
    args = [torch.randn(3, 5, 8), *pool(), ROUTED.weights]

    def plain(hidden, down, up, weights):
        routed = ROUTED._replace(weights=weights)
        return peer(hidden, down, up, routed, (torch.ones(8), None)).square().sum()

    got, want = grad(loss, (0, 1, 2, 3))(*args), grad(plain, (0, 1, 2, 3))(*args)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batched", [(0,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_vmap_is_a_loop(batched):
    args = [torch.randn(3, 5, 8), *pool(), ROUTED.weights]
    many = [torch.rand(4, *a.shape) if i in batched else a for i, a in enumerate(args)]
    dims = tuple(0 if i in batched else None for i in range(4))
    ones = [[a[n] if i in batched else a for i, a in enumerate(many)] for n in range(4)]
    want = torch.stack([loss(*one) for one in ones])
    torch.testing.assert_close(vmap(loss, dims)(*many), want)
    with torch.no_grad():
        torch.testing.assert_close(vmap(loss, dims)(*many), want)
    gradient = vmap(grad(loss), dims)(*many)
    torch.testing.assert_close(gradient, torch.stack([grad(loss)(*one) for one in ones]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_agrees(enabled):
    args = (torch.randn(3, 5, 8), *pool(), ROUTED.weights)
    gradient = vjp(loss, *args)[1](torch.tensor(1.0))
    with torch.set_grad_enabled(enabled):
        _, push = jvp(loss, args, gradient)
    torch.testing.assert_close(push, sum(part.square().sum() for part in gradient))


@pytest.mark.parametrize("enabled", [True, False])
def test_compiles_whole(enabled):
    def whole(vision, hidden, keys, down, up):
        routed = route_experts(vision, vision, torch.zeros_like(vision[:, 0]), keys, keys, top_k=3)
        return apply_experts(hidden, down, up, routed)

    args = torch.randn(3, 4), torch.randn(3, 5, 8), torch.randn(6, 4), *pool()
    with torch.set_grad_enabled(enabled):
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), whole(*args))


@pytest.mark.parametrize(("num_rows", "num_experts"), [(3, 6), (0, 6), (3, 0)])
def test_ops_are_well_registered(num_rows, num_experts):
    vision, keys = torch.randn(num_rows, 4), torch.randn(num_experts, 4)
    alive = torch.ones(num_experts, dtype=torch.bool)
    args = (vision, vision, torch.zeros(num_rows), keys, keys, alive, 0.5)
    torch.library.opcheck(torch.ops.errata.route_experts.default, args)
    routed = route_experts(*args[:5])
    hidden, lengths = torch.randn(num_rows, 5, 8), torch.full((num_rows,), 5)
    experts = [part[:num_experts] for part in pool()]
    args = (hidden, *experts, *routed, lengths, torch.ones(8), None, 1e-5, "relu")
    torch.library.opcheck(torch.ops.errata.apply_experts.default, args)


def test_what_does_not_fit_is_refused_all_at_once():
    hidden, (down, up) = torch.randn(2, 3, 8), pool()
    with pytest.raises(ValueError, match=r"up must be \[6, 2, 8\].*activation must be one of"):
        apply_experts(hidden, down, up[:, :, :7], routes([0], [1]), activation="gelu")
    with pytest.raises(ValueError, match=r"threshold must be \[2\].*top_k must be at least 1"):
        route_experts(hidden[:, 0], hidden[:, 0], torch.zeros(3), down[:, 0], down[:, 0], top_k=0)
