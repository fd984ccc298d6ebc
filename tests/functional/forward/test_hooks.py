"""Calls with other parameters and rewrites leave the module as it was."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from errata.functional.errors import UnknownSiteError
from errata.functional.forward.hooks import compose_hooks, forward_hooks, functional_call

Pair = namedtuple("Pair", "value extra")


class Split(nn.Module):
    """Gives its tensor in a tuple, a named tuple, or a mapping that is also a tuple."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.kind(self.inner(x), "kept")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_parameters_are_swapped_for_one_call():
    module = net()
    before = {name: p.clone() for name, p in module.named_parameters()}
    x = torch.ones(2, 3)
    other = {name: p.detach() * 2 for name, p in module.named_parameters()}
    got = functional_call(module, other, (x,))
    want = (x @ other["0.weight"].T + other["0.bias"]).relu() @ other["2.weight"].T + other[
        "2.bias"
    ]
    torch.testing.assert_close(got, want)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_parameters_not_named_keep_their_values():
    module, x = net(), torch.ones(1, 3)
    bias = torch.tensor([1.0, 2.0])
    changed = functional_call(module, {"2.bias": bias}, (x,))
    torch.testing.assert_close(changed - module(x), (bias - module[2].bias).expand(1, 2))


def test_a_rewrite_sees_input_and_output():
    module, x = net(), torch.randn(2, 3)
    seen = {}

    def note(given, out):
        seen["given"], seen["out"] = given, out
        return out * 0

    got = functional_call(module, {}, (x,), hooks={"0": note})
    assert torch.equal(seen["given"], x)
    torch.testing.assert_close(seen["out"], module[0](x))
    torch.testing.assert_close(got, module[2].bias.expand(2, 2))


@pytest.mark.parametrize("kind", [lambda *a: tuple(a), Pair], ids=["tuple", "named"])
def test_a_rewrite_changes_the_first_of_several_outputs(kind):
    module = Split(kind)
    x = torch.ones(1, 3)
    with forward_hooks(nn.ModuleDict({"part": module}), {"part": lambda given, out: out + 1}):
        got = module(x)
    torch.testing.assert_close(got[0], module.inner(x) + 1)
    assert got[1] == "kept"
    assert type(got) is type(kind(x, "kept"))


def test_a_rewrite_of_a_keyword_input_sees_it():
    class Named(nn.Module):
        def forward(self, *, hidden_states, flag):
            return hidden_states * 2

    holder = nn.ModuleDict({"part": Named()})
    with forward_hooks(holder, {"part": lambda given, out: out - given}):
        got = holder["part"](flag=True, hidden_states=torch.ones(2))
    assert torch.equal(got, torch.ones(2))


def test_rewrites_are_removed_even_when_the_call_fails():
    module = net()

    def fail(given, out):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        functional_call(module, {}, (torch.ones(1, 3),), hooks={"0": fail})
    assert not any(part._forward_hooks for part in module.modules())


def test_an_unknown_site_is_refused_and_nothing_stays():
    module = net()
    with pytest.raises(UnknownSiteError, match="no '7'"):
        functional_call(
            module, {}, (torch.ones(1, 3),), hooks={"0": lambda x, y: y, "7": lambda x, y: y}
        )
    assert not any(part._forward_hooks for part in module.modules())


def test_compose_runs_in_order():
    double, increase = {"0": lambda x, y: y * 2}, {"0": lambda x, y: y + 1, "1": lambda x, y: y}
    module, x = net(), torch.randn(2, 3)
    joined = compose_hooks(double, increase)
    assert set(joined) == {"0", "1"}
    got = joined["0"](x, torch.ones(1))
    assert got == 3
    assert not torch.equal(
        functional_call(module, {}, (x,), hooks=joined),
        functional_call(module, {}, (x,), hooks=compose_hooks(increase, double)),
    )


def test_call_composes_with_grad_and_vmap():
    module, x = net(), torch.randn(5, 3)

    def score(weight):
        return functional_call(
            module, {"0.weight": weight}, (x,), hooks={"1": lambda a, b: b * 2}
        ).sum()

    weight = module[0].weight.detach()
    stack = torch.stack([weight, weight * 2])
    each = vmap(grad(score))(stack)
    for value, got in zip(stack, each):
        value = value.clone().requires_grad_()
        (want,) = torch.autograd.grad(score(value), value)
        torch.testing.assert_close(got, want)
