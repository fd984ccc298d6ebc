"""Optimisers against torch.optim; many edits at once against one; donated against pure."""

import pytest
import torch
from torch.func import vmap

from errata.functional.gradients import optimizers, schedules
from tests.parity import assert_parity

MAKE = {
    "adam": (
        lambda **k: optimizers.adam(lr=1e-2, weight_decay=0.1, **k),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    ),
    "adamw": (
        lambda **k: optimizers.adamw(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, **k),
        lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    "sgd": (lambda **k: optimizers.sgd(lr=0.1, **k), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        lambda **k: optimizers.sgd(lr=0.1, momentum=0.9, weight_decay=0.01, **k),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
}
each_optimizer = pytest.mark.parametrize("name", MAKE)
donated = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


def tree(seed=0, lead=()):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(*lead, 3, 4, generator=generator),
        "b": torch.randn(*lead, 5, generator=generator),
    }


def clone(tensors):
    return {n: t.clone() for n, t in tensors.items()}


def descend(optimizer, tensors, grads, num_edits=0, masks=None, **options):
    state = optimizer.init(tensors, num_edits)
    for n, grad in enumerate(grads):
        mask = {} if masks is None else {"mask": masks[n]}
        tensors, state = optimizer.update(grad, state, tensors, **mask, **options)
    return tensors, state


def assert_same(got, want, tolerance=1e-7):
    assert got.keys() == want.keys()
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=tolerance, atol=tolerance)


@each_optimizer
@donated
def test_steps_are_those_of_torch(name, donate):
    ours, theirs = MAKE[name]
    start, grads = tree(), [tree(seed) for seed in range(1, 9)]
    leaves = {n: t.clone().requires_grad_() for n, t in start.items()}
    reference = theirs(list(leaves.values()))
    for grad in grads:
        for n, leaf in leaves.items():
            leaf.grad = grad[n].clone()
        reference.step()
    got, state = descend(ours(inplace=donate), clone(start), grads)
    assert_same(got, {n: t.detach() for n, t in leaves.items()}, 1e-6 if donate else 1e-7)
    assert state.step == 8


@each_optimizer
def test_pure_by_default(name):
    optimizer = MAKE[name][0]()
    start, grad = tree(), tree(1)
    state = optimizer.init(start)
    optimizer.update(grad, state, start)
    for given in (start, grad):
        assert all(t._version == 0 for t in given.values())
    assert state.step == 0
    assert all((t == 0).all() for part in state[1:] for t in dict(part).values())


@each_optimizer
def test_donated_tensors_are_the_ones_handed_back(name):
    optimizer = MAKE[name][0](inplace=True)
    start = tree()
    got, _ = optimizer.update(tree(1), optimizer.init(start), start)
    assert all(got[n] is start[n] for n in start)
    assert not torch.equal(start["w"], tree()["w"])


MASKS = [[True, True, True], [True, False, True], [True, False, False], [True, True, False]]


@each_optimizer
@donated
def test_finished_edits_stay_and_each_counts_its_own_steps(name, donate):
    optimizer = MAKE[name][0](inplace=donate)
    start, grads = tree(lead=(3,)), [tree(seed, lead=(3,)) for seed in range(1, 5)]
    masks = [torch.tensor(mask) for mask in MASKS]
    got, state = descend(optimizer, clone(start), grads, 3, masks)
    assert state.step.tolist() == [4, 2, 2]
    alone = MAKE[name][0]()
    for e in range(3):
        mine = [{n: t[e] for n, t in g.items()} for g, m in zip(grads, MASKS) if m[e]]
        want, _ = descend(alone, {n: t[e].clone() for n, t in start.items()}, mine)
        assert_same({n: t[e] for n, t in got.items()}, want, 1e-6)


@each_optimizer
def test_vmap_is_the_loop(name):
    optimizer = MAKE[name][0]()
    start, grads = tree(lead=(3,)), [tree(seed, lead=(3,)) for seed in range(1, 4)]

    def run(tensors, *grads):
        return descend(optimizer, tensors, grads)[0]

    got = vmap(run)(start, *grads)
    want = descend(optimizer, start, grads, 3)[0]
    assert_same(got, want)


@each_optimizer
@donated
def test_a_decay_reference_decays_with_the_change(name, donate):
    """Weight decay on a change d with reference W is weight decay on W + d."""
    base, start = tree(5), {n: torch.zeros_like(t) for n, t in tree().items()}
    grads = [tree(seed) for seed in range(1, 5)]
    whole, _ = descend(MAKE[name][0](), base, grads)
    got, _ = descend(MAKE[name][0](inplace=donate), clone(start), grads, decay_reference=base)
    assert_same({n: base[n] + got[n] for n in base}, whole, 1e-5)
    stacked = {n: torch.stack([t, t]) for n, t in start.items()}
    twice = [{n: torch.stack([t, t]) for n, t in g.items()} for g in grads]
    both, _ = descend(
        MAKE[name][0](inplace=donate), stacked, twice, 2, decay_reference={"w": base["w"]}
    )
    assert_parity(both["w"][1], got["w"])


@donated
def test_gradients_may_come_in_another_order(donate):
    start, grad = tree(), tree(1)
    optimizer = optimizers.adam(inplace=donate)
    turned = dict(reversed(grad.items()))
    got, _ = optimizer.update(turned, optimizer.init(start), clone(start))
    want, _ = optimizer.update(grad, optimizer.init(start), clone(start))
    assert_same(got, want)


@each_optimizer
def test_gradients_may_lie_in_memory_in_another_order(name):
    start, grads = tree(lead=(3,)), [tree(seed, lead=(3,)) for seed in (1, 2)]
    turned = [
        {n: g.mT.contiguous().mT if g.ndim == 3 else g for n, g in one.items()} for one in grads
    ]
    assert turned[0]["w"].stride() != start["w"].stride()
    for masks in (None, [torch.tensor([True, False, True])] * 2):
        want, _ = descend(MAKE[name][0](), start, grads, 3, masks)
        got, _ = descend(MAKE[name][0](inplace=True), clone(start), turned, 3, masks)
        assert_same(got, want, 1e-6)


@donated
def test_schedules_follow_each_edits_steps(donate):
    start, grads = {"w": torch.zeros(2, 3)}, [{"w": torch.ones(2, 3)}] * 3
    masks = [torch.tensor(m) for m in ([True, True], [True, False], [True, True])]
    made = optimizers.sgd(schedules.exponential_schedule(1.0, 0.5), inplace=donate)
    got, _ = descend(made, clone(start), grads, 2, masks)
    assert got["w"][:, 0].tolist() == [-1.75, -1.5]
    halved, _ = descend(optimizers.sgd(1.0, inplace=donate), clone(start), grads[:1], 2, scale=0.5)
    assert halved["w"][0, 0] == -0.5


def test_gradients_are_clipped_as_torch_does():
    grads = tree(1)
    leaves = [torch.zeros_like(t).requires_grad_() for t in grads.values()]
    for leaf, grad in zip(leaves, grads.values()):
        leaf.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    got, total = schedules.clip_grad_norm(grads, 1.0)
    torch.testing.assert_close(total, norm)
    for leaf, grad in zip(leaves, got.values()):
        torch.testing.assert_close(grad, leaf.grad)
    small, _ = schedules.clip_grad_norm(grads, 1e6)
    assert_same(small, grads)
    stacked = {n: torch.stack([t, 100 * t]) for n, t in grads.items()}
    each, norms = vmap(lambda g: schedules.clip_grad_norm(g, 1.0))(stacked)
    assert norms.shape == (2,)
    assert_same({n: t[0] for n, t in each.items()}, got, 1e-6)


@donated
def test_clamp_bounds_every_element(donate):
    tensors = tree()
    got = schedules.clip_elements(tensors, 0.5, inplace=donate)
    assert all(t.abs().max() <= 0.5 for t in got.values())
    assert (got["w"] is tensors["w"]) == donate
    assert torch.equal(got["b"], tree()["b"].clamp(-0.5, 0.5))


def test_a_mask_needs_a_step_per_edit():
    optimizer, start = optimizers.adam(), tree(lead=(2,))
    with pytest.raises(AssertionError, match="num_edits"):
        optimizer.update(start, optimizer.init(start), start, mask=torch.tensor([True, False]))


@donated
def test_bf16_stays_bf16(donate):
    start = {n: t.bfloat16() for n, t in tree().items()}
    grad = {n: t.bfloat16() for n, t in tree(1).items()}
    optimizer = optimizers.adamw(lr=1e-2, inplace=donate)
    got, state = optimizer.update(grad, optimizer.init(start), clone(start))
    assert all(t.dtype == torch.bfloat16 for t in (*got.values(), *state.mean.values()))
    assert not torch.equal(got["w"], start["w"])
