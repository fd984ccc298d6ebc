"""Per-edit factors against the gradient they stand for."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from errata.functional.binding.bound_model import bind
from errata.functional.forward.batches import mean_per_edit, take_rows
from errata.functional.gradients import optimizers
from errata.functional.gradients.factors import (
    GradientFactors,
    factored_gradients,
    gradient_factors,
    weight_gradient,
)
from errata.functional.gradients.losses import nll
from tests.functional.binding.test_bound_model import dense
from tests.parity import assert_parity

SITES = ["layers.1.down", "layers.2.up", "layers.2.attn.v", "head"]


def true_gradient(model, batch, site):
    name = model.card.tied.get(f"{site}.weight", f"{site}.weight")

    def loss(weight):
        params = {**model.params, name: weight}
        return nll(model.decode(params, batch), batch.labels).sum()

    found = grad(loss)(model.params[name])
    return found.mT if site in model.card.transposed else found


def test_the_outer_product_is_the_weight_gradient(toy, queries):
    batch = toy.embed(toy.params, toy.preprocess(queries))
    found = gradient_factors(toy, batch, SITES[:3])
    for site, factor in found.items():
        got, want = weight_gradient(factor).sum(0), true_gradient(toy, batch, site)
        assert_parity(got, want)
    assert all(not p.requires_grad and p.grad is None for p in toy.params.values())


def test_each_row_has_its_own_gradient(toy, queries):
    batch = toy.embed(toy.params, toy.preprocess(queries))
    got = weight_gradient(gradient_factors(toy, batch, SITES[:1])[SITES[0]])
    for row in range(batch.num_rows):
        want = true_gradient(toy, take_rows(batch, slice(row, row + 1)), SITES[0])
        assert_parity(got[row], want)


def test_padding_gives_no_gradient(toy, queries):
    batch = toy.embed(toy.params, toy.preprocess(queries))
    delta = gradient_factors(toy, batch, SITES[:1])[SITES[0]].output_grad
    assert torch.equal(delta[~batch.attention_mask], torch.zeros_like(delta[~batch.attention_mask]))
    assert (delta[batch.attention_mask].abs().sum(-1) > 0).any()


def test_factors_work_under_grad_and_vmap(toy, queries):
    """MEND's training differentiates through the factors; vmap gives the loop over scales."""
    batch = toy.embed(toy.params, toy.preprocess(queries[:2]))

    def size(scale):
        params = {**toy.params, "layers.0.down.weight": toy.params["layers.0.down.weight"] * scale}
        found = gradient_factors(toy._replace(params=params), batch, SITES[:1])[SITES[0]]
        return weight_gradient(found).pow(2).sum()

    at = torch.tensor([1.0, 0.5])
    got = vmap(grad(size))(at)
    for n, scale in enumerate(at):
        step = 1e-2
        slope = (size(scale + step) - size(scale - step)) / (2 * step)
        torch.testing.assert_close(got[n], slope, rtol=2e-2, atol=1e-4)


def test_a_factor_of_one_token_is_rank_one():
    u, d = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 0.0, 1.0]]])
    assert torch.equal(weight_gradient(GradientFactors(u, d))[0], d[0].T @ u[0])


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("depth", [1, 2, "thinned"])
def test_a_step_on_factors_is_a_step_on_gradients(toy, queries, donate, depth):
    """Transposed and plain weights and a bias; rows of an edit, of none, of an edit with two."""
    low = {1: ["layers.1.attn.q.weight"]}.get(depth, [])
    names = [*low, "layers.2.up.weight", "layers.2.down.weight", "layers.2.down.bias"]
    delta = dense(toy, names, edits=4)
    batch = toy.embed(
        toy.params, toy.preprocess(queries), edit_index=torch.tensor([3, 1, -1, 0, 1])
    )
    batch = toy.decode(toy.params, batch, stop=2 if depth == "thinned" else depth)
    batch = toy.select_scored(toy.params, batch) if depth == "thinned" else batch

    def loss(logits):
        each = mean_per_edit(nll(logits, batch.labels), batch.edit_index, 4)
        return each.sum(), each.detach()

    def total(tensors):
        bound = bind(toy, delta._replace(tensors=tensors), check=False)
        return loss(bound.decode(bound.params, batch))

    want, each = grad(total, has_aux=True)(dict(delta.tensors))
    got, aux = factored_gradients(toy, delta, batch, loss)
    torch.testing.assert_close(aux, each)
    assert [name for name, g in got.items() if isinstance(g, Tensor)] == ["layers.2.down.bias"]
    for name, g in got.items():
        formed = g if isinstance(g, Tensor) else g.to_dense(4)
        assert_parity(formed, want[name])
    for make in (optimizers.adamw, optimizers.adam, optimizers.sgd):
        mask = torch.tensor([True, False, True, True])
        ends = []
        for grads in (want, got):
            optimizer = make(1e-2, weight_decay=0.1, inplace=donate)
            tensors = {n: t.clone() for n, t in delta.tensors.items()}
            state = optimizer.init(tensors, 4)
            for _ in range(2):
                tensors, state = optimizer.update(grads, state, tensors, mask=mask)
            ends.append(tensors)
        for name in want:
            torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-4, atol=1e-5)
            assert torch.equal(ends[1][name][1], delta.tensors[name][1])


def test_edits_that_must_run_apart_get_plain_gradients(toy, queries):
    delta = dense(toy, ["layers.2.norm.weight", "layers.2.down.weight"], edits=5)
    batch = toy.embed(toy.params, toy.preprocess(queries), edit_index=torch.arange(5))

    def loss(logits):
        return nll(logits, batch.labels).sum(), ()

    def total(tensors):
        bound = bind(toy, delta._replace(tensors=tensors), check=False)
        return loss(bound.decode(bound.params, batch))[0]

    got, _ = factored_gradients(toy, delta, batch, loss)
    for name, want in grad(total)(dict(delta.tensors)).items():
        torch.testing.assert_close(got[name], want)
        assert want.abs().max() > 0
