"""Per-edit factors against the gradient they stand for."""

import torch
from torch.func import grad, vmap

from errata.functional.factors import Factor, factors, gradient
from errata.functional.losses import nll
from errata.functional.rows import take

SITES = ["layers.1.down", "layers.2.up", "layers.2.attn.v", "head"]


def true_gradient(model, batch, site):
    name = model.card.ties.get(f"{site}.weight", f"{site}.weight")

    def loss(weight):
        params = {**model.params, name: weight}
        return nll(model.decode(params, batch), batch.labels).sum()

    found = grad(loss)(model.params[name])
    return found.mT if site in model.card.transposed else found


def test_the_outer_product_is_the_weight_gradient(toy, queries):
    batch = toy.embed(toy.params, toy.read(queries))
    found = factors(toy, batch, SITES[:3])
    for site, factor in found.items():
        got, want = gradient(factor).sum(0), true_gradient(toy, batch, site)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(not p.requires_grad and p.grad is None for p in toy.params.values())


def test_each_row_has_its_own_gradient(toy, queries):
    batch = toy.embed(toy.params, toy.read(queries))
    got = gradient(factors(toy, batch, SITES[:1])[SITES[0]])
    for row in range(batch.rows):
        want = true_gradient(toy, take(batch, slice(row, row + 1)), SITES[0])
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-6)


def test_padding_gives_no_gradient(toy, queries):
    batch = toy.embed(toy.params, toy.read(queries))
    delta = factors(toy, batch, SITES[:1])[SITES[0]].delta
    assert torch.equal(delta[~batch.mask], torch.zeros_like(delta[~batch.mask]))
    assert (delta[batch.mask].abs().sum(-1) > 0).any()


def test_factors_work_under_grad_and_vmap(toy, queries):
    """MEND's training differentiates through the factors; vmap gives the loop over scales."""
    batch = toy.embed(toy.params, toy.read(queries[:2]))

    def size(scale):
        params = {**toy.params, "layers.0.down.weight": toy.params["layers.0.down.weight"] * scale}
        found = factors(toy._replace(params=params), batch, SITES[:1])[SITES[0]]
        return gradient(found).pow(2).sum()

    at = torch.tensor([1.0, 0.5])
    got = vmap(grad(size))(at)
    for n, scale in enumerate(at):
        step = 1e-2
        slope = (size(scale + step) - size(scale - step)) / (2 * step)
        torch.testing.assert_close(got[n], slope, rtol=2e-2, atol=1e-4)


def test_a_factor_of_one_token_is_rank_one():
    u, d = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 0.0, 1.0]]])
    assert torch.equal(gradient(Factor(u, d))[0], d[0].T @ u[0])
