"""Taps record what goes through sites; probes read gradients there."""

import torch
from torch import nn
from torch.func import grad, vmap

from errata.functional.forward.activations import record_activations
from errata.functional.forward.hooks import forward_hooks


class Flat(nn.Module):
    """Flattens rows and tokens, as OPT's feed-forward part does."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 4)

    def forward(self, x):
        return self.up(x.reshape(-1, 3)).reshape(*x.shape[:2], 4)


def decode_of(module):
    def decode(params, batch, hooks, scale=1):
        with forward_hooks(module, hooks):
            return torch.func.functional_call(module, dict(params), (batch,)) * scale

    return decode


def test_taps_see_behind_rewrites_and_options_pass_through():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x = torch.randn(2, 5, 3)
    double = {"0": lambda given, out: out * 2}
    result, taps = record_activations(decode_of(module), {}, x, ["0"], hooks=double, scale=3)
    assert torch.equal(taps["0"].input, x)
    torch.testing.assert_close(taps["0"].output, module[0](x) * 2)
    torch.testing.assert_close(result, taps["0"].output.tanh() * 3)


def test_delta_and_input_give_the_weight_gradient():
    module = nn.Sequential(Flat(), nn.Tanh())
    x = torch.randn(2, 5, 3)
    weight = module[0].up.weight.detach()
    decode = decode_of(module)

    def by_probe(probes):
        out, taps = record_activations(
            decode, {"0.up.weight": weight}, x, ["0.up"], perturbations=probes
        )
        return out.square().sum(), taps["0.up"].input

    def by_weight(value):
        return decode({"0.up.weight": value}, x, {}).square().sum()

    probe = {"0.up": torch.zeros(2, 5, 4)}
    delta, given = grad(by_probe, has_aux=True)(probe)
    product = torch.einsum("bto,bti->oi", delta["0.up"], given.reshape(2, 5, 3))
    torch.testing.assert_close(product, grad(by_weight)(weight))


def test_probes_work_under_vmap():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    x = torch.randn(6, 1, 5, 3)
    decode = decode_of(module)

    def loss(probe, given):
        out, _ = record_activations(decode, {}, given, [], perturbations={"0": probe})
        return out.square().sum()

    zeros = torch.zeros(6, 1, 5, 4)
    each = vmap(grad(loss))(zeros, x)
    for row in range(6):
        torch.testing.assert_close(each[row], grad(loss)(zeros[row], x[row]))
