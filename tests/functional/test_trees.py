"""Algebra on dicts of tensors."""

import pytest
import torch

from errata.functional import trees


def tree(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(3, 2, generator=generator) for n in ("v", "w")}


def test_the_axioms_of_a_vector_space():
    a, b = tree(0), tree(1)
    for got, want in [
        (trees.sub(trees.add(a, b), b), a),
        (trees.lerp(a, b, 0.25), trees.add(trees.scale(a, 0.75), trees.scale(b, 0.25))),
        (trees.scale(a, torch.tensor(2.0)), trees.add(a, a)),
    ]:
        for name in a:
            torch.testing.assert_close(got[name], want[name])
    torch.testing.assert_close(trees.dot(a, a), trees.norm(a) ** 2)
    torch.testing.assert_close(trees.dot(a, b), trees.dot(b, a))


def test_arguments_are_left_alone():
    a, b = tree(0), tree(1)
    copies = {n: t.clone() for n, t in a.items()}
    for made in (trees.add(a, b), trees.sub(a, b), trees.scale(a, 2.0), trees.lerp(a, b, 0.5)):
        assert all(made[n] is not a[n] for n in a)
    assert all(torch.equal(a[n], copies[n]) and a[n]._version == 0 for n in a)


def test_stack_and_unstack_are_inverse():
    many = [tree(n) for n in range(4)]
    stacked = trees.stack(many)
    assert stacked["w"].shape == (4, 3, 2)
    for one, back in zip(many, trees.unstack(stacked), strict=True):
        assert all(torch.equal(one[n], back[n]) for n in one)
    assert trees.select(stacked, ["w"]).keys() == {"w"}
    assert trees.unstack({}) == []


def test_norm_of_nothing_is_zero_and_of_bf16_is_exact():
    assert trees.norm({}) == 0
    assert trees.dot({}, {}) == 0
    half = {"w": torch.full((4096,), 0.01, dtype=torch.bfloat16)}
    want = half["w"].double().norm()
    torch.testing.assert_close(trees.norm(half).double(), want, rtol=1e-6, atol=0)


def test_other_names_are_our_own_mistake():
    with pytest.raises(AssertionError, match="names differ"):
        trees.add(tree(0), {"v": torch.zeros(3, 2)})
