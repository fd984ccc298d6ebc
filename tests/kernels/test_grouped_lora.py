"""Rows under different deltas: each its own edit, none its neighbour's."""

import math

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

from errata.kernels import apply_grouped_lora
from errata.kernels.grouped_lora import ref

EDIT = torch.tensor([2, -1, 0, 2])


def inputs(dtype=torch.float32):
    shapes = (4, 3, 6), (3, 2, 6), (3, 5, 2), (4, 3, 5)  # x, A, B, base
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def loop(x, down, up, base=None):
    """One dense product per row."""
    rows = []
    for row, edit in enumerate(EDIT.tolist()):
        own = 0 if base is None else base[row]
        change = x[row] @ down[edit].T @ up[edit].T if edit >= 0 else x.new_zeros(3, 5)
        rows.append(own + change)
    return torch.stack(rows)


def loss(x, down, up, base):
    return apply_grouped_lora(x, down, up, EDIT, base).square().sum()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("based", [True, False])
def test_each_row_goes_through_its_edit(enabled, based):
    x, down, up, base = inputs()
    base = base if based else None
    with torch.set_grad_enabled(enabled):
        got = apply_grouped_lora(x, down, up, EDIT, base)
        torch.testing.assert_close(got, loop(x, down, up, base))
        assert torch.equal(got[1], torch.zeros(3, 5) if base is None else base[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    args = inputs(dtype)
    got = apply_grouped_lora(*args[:3], EDIT, args[3])
    want = loop(*(part.double() for part in args))
    unit = torch.finfo(dtype).eps / 2
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= unit * want.abs() * 1.001 + 1e-5).all()


def test_base_gives_the_dtype():
    x, down, up, base = inputs()
    got = apply_grouped_lora(x.bfloat16(), down, up, EDIT, base)
    assert got.dtype == torch.float32
    assert apply_grouped_lora(x.bfloat16(), down, up, EDIT).dtype == torch.bfloat16


@pytest.mark.parametrize("enabled", [True, False])
def test_a_row_without_an_edit_keeps_its_bits(enabled):
    x, down, up, base = inputs()
    base[1, 0, :3] = torch.tensor([-0.0, math.nan, -math.inf])
    down[0], x[1] = math.nan, math.inf
    with torch.set_grad_enabled(enabled):
        got = apply_grouped_lora(x, down, up, EDIT, base)
        none = apply_grouped_lora(x, down[:0], up[:0], torch.full((4,), -1), base)
        zero = apply_grouped_lora(x, down[:0], up[:0], torch.full((4,), -1))
    assert torch.equal(got[1].view(torch.int32), base[1].view(torch.int32))
    assert torch.equal(none.view(torch.int32), base.view(torch.int32))
    assert not zero.any()
    assert got[0].isfinite().all()
    assert got[2].isnan().all()


def test_neighbours_of_one_edit_go_together():
    x, down, up, base = inputs()
    edit = torch.tensor([1, 1, -1, 1])
    for given in (base, None):
        with torch.no_grad():
            got = apply_grouped_lora(x, down, up, edit, given)
        torch.testing.assert_close(got, ref.grouped_lora_differentiable(x, down, up, edit, given))
        with torch.no_grad():
            none = apply_grouped_lora(
                x[:0], down, up, edit[:0], None if given is None else given[:0]
            )
        assert none.shape == (0, 3, 5)


def test_gradient_is_that_of_the_loop():
    args = inputs()
    got = grad(loss, (0, 1, 2, 3))(*args)
    want = grad(lambda *a: loop(*a).square().sum(), (0, 1, 2, 3))(*args)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not got[1][1].any(), "an edit that no row names has no gradient"


@pytest.mark.parametrize("batched", [(0,), (1, 2), (3,), (0, 1, 2, 3)], ids=str)
def test_vmap_is_a_loop(batched):
    args = inputs()
    many = [torch.randn(4, *a.shape) if i in batched else a for i, a in enumerate(args)]
    dims = tuple(0 if i in batched else None for i in range(4))
    ones = [[a[n] if i in batched else a for i, a in enumerate(many)] for n in range(4)]
    want = torch.stack([loss(*one) for one in ones])
    torch.testing.assert_close(vmap(loss, dims)(*many), want)
    with torch.no_grad():
        torch.testing.assert_close(vmap(loss, dims)(*many), want)
    gradient = vmap(grad(loss, 1), dims)(*many)
    torch.testing.assert_close(gradient, torch.stack([grad(loss, 1)(*one) for one in ones]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_agrees(enabled):
    args = tuple(inputs())
    gradient = vjp(loss, *args)[1](torch.tensor(1.0))
    with torch.set_grad_enabled(enabled):
        _, push = jvp(loss, args, gradient)
    torch.testing.assert_close(push, sum(part.square().sum() for part in gradient))


@pytest.mark.parametrize("enabled", [True, False])
def test_compiles_whole(enabled):
    args = inputs()
    with torch.set_grad_enabled(enabled):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), loss(*args))
    compiled = torch.compile(grad(loss, 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), grad(loss, 1)(*args))


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("num_rows", [4, 0])
def test_op_is_well_registered(num_rows, based):
    x, down, up, base = inputs()
    args = (x[:num_rows], down, up, EDIT[:num_rows], base[:num_rows] if based else None)
    torch.library.opcheck(torch.ops.errata.grouped_lora.default, args)


def test_what_does_not_fit_is_refused_all_at_once():
    x, down, up, base = inputs()
    with pytest.raises(
        ValueError, match=r"up must be \[3 O 2\].*edit_index must be \[4\] integers"
    ):
        apply_grouped_lora(x, down, up.mT, EDIT.float())
    with pytest.raises(ValueError, match=r"base must be \[4, 3, 5\]"):
        apply_grouped_lora(x, down, up, EDIT, base[:, :2])
