"""Losses against their definitions in fp64, and under torch.func."""

import pytest
import torch
from torch.func import grad, vmap

from errata.functional import IGNORE_INDEX
from errata.functional.gradients import losses
from tests.parity import assert_parity

LABELS = torch.tensor([[3, 1, IGNORE_INDEX], [0, 4, 2], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])


@pytest.fixture
def logits():
    return torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)) * 3


def by_row(values):
    return torch.tensor([v.mean() if len(v) else 0.0 for v in values], dtype=torch.float64)


def chosen(values):
    return by_row([values[b][LABELS[b] != IGNORE_INDEX] for b in range(3)])


def test_nll_is_the_mean_over_scored_tokens(logits):
    log_p = logits.double().log_softmax(-1)
    own = -log_p.gather(-1, LABELS.clamp_min(0)[..., None])[..., 0]
    got = losses.nll(logits, LABELS)
    torch.testing.assert_close(got.double(), chosen(own), rtol=1e-6, atol=1e-6)
    assert losses.nll(logits.bfloat16(), LABELS).dtype == torch.float32


def test_kl_is_zero_for_equals_and_the_definition_else(logits):
    other = logits.flip(0)
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    want = chosen((p.exp() * (p - q)).sum(-1))
    got = losses.kl(logits, other, LABELS)
    assert_parity(got.double(), want)
    torch.testing.assert_close(losses.kl(logits, logits, LABELS), torch.zeros(3))


def test_margin_is_zero_exactly_where_the_target_leads(logits):
    loose = losses.margin_loss(logits, LABELS)
    for row in range(2):
        keep = LABELS[row] != IGNORE_INDEX
        right = logits[row].argmax(-1)[keep] == LABELS[row][keep]
        assert bool(loose[row] == 0) == bool(right.all())
    own = logits.gather(-1, LABELS.clamp_min(0)[..., None])[..., 0]
    other = logits.scatter(-1, LABELS.clamp_min(0)[..., None], -torch.inf).amax(-1)
    want = chosen((0.7 + other - own).clamp_min(0).double())
    got = losses.margin_loss(logits, LABELS, min_margin=0.7)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["nll", "margin_loss", "kl"])
def test_rows_are_independent_and_vmap_is_the_loop(logits, name):
    def loss(z, y):
        if name == "kl":
            return losses.kl(logits[:1].expand_as(z), z, y)
        return getattr(losses, name)(z, y)

    def one(z, y):
        return loss(z[None], y[None])[0]

    torch.testing.assert_close(vmap(one)(logits, LABELS), loss(logits, LABELS))
    together = grad(lambda z: loss(z, LABELS).sum())(logits)
    torch.testing.assert_close(vmap(grad(one))(logits, LABELS), together)
    assert torch.equal(together[2], torch.zeros(3, 5)), "a row without labels pulls at nothing"
    assert torch.isfinite(together).all()
