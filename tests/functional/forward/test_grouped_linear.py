"""The grouped product: definition, gradients of both orders, vmap."""

import pytest
import torch
from torch.func import grad, vmap

from errata.functional.forward.grouped_linear import FactoredGradient, grouped_linear

EDITS = {
    "in order": [0, 1, 2],
    "two each": [0, 0, 1, 1, 2, 2],
    "any order": [2, 0, -1, 2, 1, 0, 2],
    "runs": [1, 1, 1, 0],
    "one": [2],
    "base": [-1, -1],
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(x, maps, edit):
    """The definition, differentiable: a matrix per row."""
    own = maps[edit.clamp_min(0)] * (edit >= 0).to(maps)[:, None, None]
    return torch.einsum("bli,boi->blo", x, own)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_rows_go_through_their_own_map(edit):
    edit = torch.tensor(edit)
    x, maps = normal(len(edit), 4, 5), normal(3, 6, 5, seed=1)
    torch.testing.assert_close(grouped_linear(x, maps, edit), plain(x, maps, edit))
    stored = maps.mT.contiguous().mT  # another layout in memory
    torch.testing.assert_close(grouped_linear(x, stored, edit), plain(x, maps, edit))


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_gradients_of_first_and_second_order(edit):
    edit = torch.tensor(edit)
    x = normal(len(edit), 2, 3).requires_grad_()
    maps = normal(3, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: grouped_linear(x, m, edit), (x, maps))
    assert torch.autograd.gradgradcheck(lambda x, m: grouped_linear(x, m, edit), (x, maps))


@pytest.mark.parametrize("dims", [(0, None, None), (0, 0, None), (0, 0, 0), (None, 1, 0)], ids=str)
def test_vmap_is_the_loop_forward_and_backward(dims):
    edit, x, maps = torch.tensor([2, 0, -1]), normal(3, 2, 4), normal(3, 5, 4, seed=1)

    def spread(tensor, dim, seed):
        if dim is None:
            return tensor
        if tensor.dtype == torch.int64:
            return torch.stack([tensor, tensor.flip(0)])
        return torch.stack([tensor, normal(*tensor.shape, seed=seed)], dim)

    given = [spread(t, d, n) for n, (t, d) in enumerate(zip((x, maps, edit), dims), 5)]

    def loss(x, maps, edit):
        return grouped_linear(x, maps, edit).sin().sum()

    def wanted(x, maps, edit):
        return plain(x, maps, edit).sin().sum()

    for one, definition in [
        (grouped_linear, plain),
        (grad(loss, argnums=(0, 1)), grad(wanted, argnums=(0, 1))),
    ]:
        got = vmap(one, in_dims=dims)(*given)
        lanes = [
            definition(*[t if d is None else t.select(d, n) for t, d in zip(given, dims)])
            for n in range(2)
        ]
        if isinstance(got, tuple):
            lanes = [torch.stack(part) for part in zip(*lanes)]
        else:
            lanes = torch.stack(lanes)
        torch.testing.assert_close(got, type(got)(lanes) if isinstance(got, tuple) else lanes)


def test_unused_edits_get_no_gradient():
    x, maps = normal(2, 1, 3), normal(4, 2, 3, seed=1)
    got = grad(lambda m: grouped_linear(x, m, torch.tensor([3, 1])).sum())(maps)
    assert torch.equal(got[[0, 2]], torch.zeros(2, 2, 3).double())
    assert (got[[1, 3]] != 0).all()


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_gradients_in_factors_form_one_by_one(edit, tokens, monkeypatch):
    monkeypatch.setitem(
        FactoredGradient.write_edit.__globals__, "_BLOCK", 12
    )  # two blocks of two rows, and one
    edit = torch.tensor(edit)
    factors = FactoredGradient(
        normal(len(edit), tokens, 5), normal(len(edit), tokens, 6, seed=1), edit
    )
    formed = factors.to_dense(3)
    for number in range(3):
        own = (edit == number).double()
        want = torch.einsum("b,blo,bli->oi", own, factors.left, factors.right)
        torch.testing.assert_close(formed[number], want)
        for out in (torch.full((5, 6), torch.nan), torch.full((6, 5), torch.nan).mT):
            got = factors.write_edit(number, out.double())
            torch.testing.assert_close(got, want)
