"""Optimizers as pairs of pure functions over pytrees, for one edit or for a stack of edits.

    optimizer = adamw(lr=1e-3)
    state = optimizer.init(tensors)
    tensors, state = optimizer.update(grads, state, tensors)

The arithmetic is that of torch.optim, to the last bit or two. Under `torch.func.vmap` each edit has
its own step count. Without vmap, `init(tensors, num_edits=E)` gives tensors with a leading edit
axis one step count per edit, and `update(..., mask=active)` leaves finished edits unchanged.

With `inplace=True`, `update` overwrites the tensors and the state in a fused kernel and returns
them: one pass over memory instead of about ten. Use it only for tensors that your own loop made
(the result of `init`, and the delta being trained), never for the parameters of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.utils import _pytree as pytree

from errata.functional.forward.grouped_linear import FactoredGradient
from errata.functional.gradients.schedules import Schedule, Tree

__all__ = ["AdamState", "Optimizer", "SGDState", "adam", "adamw", "sgd"]


class Optimizer(NamedTuple):
    """An optimizer as two pure functions.

    Attributes:
        init: (tensors, num_edits=0) -> state. With `num_edits` = E > 0 every tensor has a leading
            edit axis of that length.
        update: (grads, state, tensors, *, mask=None, scale=1.0, decay_reference=None) -> (tensors,
            state). One step. `mask` [E] bool: edits that are False keep tensors and state (needs
            `num_edits`). Gradients may be factors (`FactoredGradient`). `scale` multiplies the
            learning rate. Weight decay acts on the sum of the tensors and `decay_reference`: with
            the base's parameters there, a change d decays as W + d does.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Tree, Any]]


class AdamState(NamedTuple):
    """State of Adam.

    Attributes:
        step: [] or [E] float64, the number of updates done.
        mean: Running mean of the gradient.
        square: Running mean of its square.
    """

    step: Tensor
    mean: Tree
    square: Tree


class SGDState(NamedTuple):
    """State of gradient descent.

    Attributes:
        step: [] or [E] float64, the number of updates done.
        momentum: The momentum; an empty tuple if there is none.
    """

    step: Tensor
    momentum: Tree


def adam(
    lr: float | Schedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    inplace: bool = False,
) -> Optimizer:
    """Make Adam, with weight decay added to the gradient.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
        x = x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        lr: Learning rate, or a schedule.
        betas: b1 and b2.
        eps: Added to the denominator.
        weight_decay: Factor of x that is added to the gradient.
        inplace: Whether `update` overwrites tensors and state.

    Returns:
        The optimizer.

    References:
        Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980.

    Example:
        >>> optimizer = adam(lr=0.1)
        >>> x = {"x": torch.tensor(1.0)}
        >>> optimizer.update({"x": torch.tensor(2.0)}, optimizer.init(x), x)[0]
        {'x': tensor(0.9000)}
    """
    return _adam(lr, betas, eps, weight_decay, decoupled=False, inplace=inplace)


def adamw(
    lr: float | Schedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    inplace: bool = False,
) -> Optimizer:
    """Make Adam with decoupled weight decay: each update first scales x by 1 - lr * weight_decay.

    Args:
        lr: Learning rate, or a schedule.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decay of x, relative to the learning rate.
        inplace: Whether `update` overwrites tensors and state.

    Returns:
        The optimizer.

    References:
        Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """
    return _adam(lr, betas, eps, weight_decay, decoupled=True, inplace=inplace)


def sgd(
    lr: float | Schedule,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    inplace: bool = False,
) -> Optimizer:
    """Make gradient descent: m = momentum m + g + weight_decay x, x = x - lr m.

    Args:
        lr: Learning rate, or a schedule.
        momentum: Factor of the momentum per update.
        weight_decay: Factor of x that is added to the gradient.
        inplace: Whether `update` overwrites tensors and state.

    Returns:
        The optimizer.
    """

    def init(tensors: Tree, num_edits: int = 0) -> SGDState:
        buffers = pytree.tree_map(torch.zeros_like, tensors) if momentum else ()
        return SGDState(_zero_steps(tensors, num_edits), buffers)

    def change(x: Tensor, g: Tensor, m: Tensor | None, base: Tensor | None, rate: Tensor):
        if weight_decay:
            g = g + weight_decay * (x if base is None else x + base)
        if m is not None:
            g = momentum * m + g
        return x - _broadcast_like(rate, x) * g, g

    def update(grads, state, tensors, *, mask=None, scale=1.0, decay_reference=None):
        rate = _learning_rate(lr, state.step, scale)
        leaves, shape = pytree.tree_flatten(tensors)
        grads, bases = (
            _dense_gradients(shape, grads, leaves, inplace),
            _decay_references(decay_reference, tensors),
        )
        buffers = shape.flatten_up_to(state.momentum) if momentum else [None] * len(leaves)
        if inplace:
            with torch.no_grad():
                for where, _, gs in _update_groups(state.step, rate, mask, leaves, grads):
                    size = rate[where] if rate.ndim else rate
                    for x, g, m, base in zip(leaves, gs, buffers, bases):
                        edit_momentum = None if m is None else m[where]
                        new_x, new_momentum = change(x[where], g, edit_momentum, base, size)
                        x[where].copy_(new_x)
                        if edit_momentum is not None:
                            edit_momentum.copy_(new_momentum)
        else:
            pairs = [change(*group, rate) for group in zip(leaves, grads, buffers, bases)]
            leaves = _where_active(mask, [pair[0] for pair in pairs], leaves)
            buffers = _where_active(mask, [pair[1] for pair in pairs], buffers) if momentum else []
        new_momentum = pytree.tree_unflatten(buffers, shape) if momentum else ()
        return pytree.tree_unflatten(leaves, shape), SGDState(
            _next_step(state.step, mask), new_momentum
        )

    return Optimizer(init, update)


def _adam(lr, betas, eps: float, weight_decay: float, *, decoupled: bool, inplace: bool):
    b1, b2 = betas

    def init(tensors: Tree, num_edits: int = 0) -> AdamState:
        mean = pytree.tree_map(torch.zeros_like, tensors)
        square = pytree.tree_map(torch.zeros_like, tensors)
        return AdamState(_zero_steps(tensors, num_edits), mean, square)

    def change(x, g, m, v, base, rate: Tensor, step: Tensor):
        if weight_decay and decoupled:
            pull = _broadcast_like(rate * weight_decay, x)
            x = x * (1 - pull) if base is None else x * (1 - pull) - pull * base
        elif weight_decay:
            g = g + weight_decay * (x if base is None else x + base)
        m = torch.lerp(m, g, 1 - b1)
        v = torch.addcmul(b2 * v, g, g, value=1 - b2)
        size = _broadcast_like(rate / (1 - b1**step), x)
        root = v.sqrt() / _broadcast_like((1 - b2**step).sqrt(), x) + eps
        return x - size * m / root, m, v

    def fused(parts: list[list[Tensor]], bases, rate: float, step: Tensor) -> None:
        xs, gs, ms, vs = parts
        # The kernel reads all four in memory order and ignores their strides.
        gs = [
            g if g.stride() == x.stride() else torch.empty_like(x).copy_(g) for x, g in zip(xs, gs)
        ]
        pull = rate * weight_decay
        for i, base in enumerate(bases):
            if base is None or not weight_decay:
                continue
            if decoupled:  # the kernel then multiplies by (1 - pull)
                xs[i].sub_(base, alpha=pull / (1 - pull))
            else:
                gs[i] = gs[i] + weight_decay * base
        torch_adam(
            xs,
            gs,
            ms,
            vs,
            [],
            [step - 1 for _ in xs],
            lr=rate,
            beta1=b1,
            beta2=b2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled,
            amsgrad=False,
            maximize=False,
            fused=True,
        )

    def update(grads, state, tensors, *, mask=None, scale=1.0, decay_reference=None):
        rate, step = _learning_rate(lr, state.step, scale), state.step + 1
        shape = pytree.tree_structure(tensors)
        olds = [shape.flatten_up_to(t) for t in (tensors, state.mean, state.square)]
        grads, bases = (
            _dense_gradients(shape, grads, olds[0], inplace),
            _decay_references(decay_reference, tensors),
        )
        if inplace:
            with torch.no_grad():
                for where, size, gs in _update_groups(state.step, rate, mask, olds[0], grads):
                    xs, ms, vs = ([leaf[where] for leaf in leaves] for leaves in olds)
                    fused([xs, gs, ms, vs], bases, size, step[where].flatten()[0].float())
            news = olds
        else:
            groups = zip(olds[0], grads, olds[1], olds[2], bases)
            triples = [change(*group, rate, step) for group in groups]
            news = [[triple[i] for triple in triples] for i in range(3)]
            news = [_where_active(mask, new, old) for new, old in zip(news, olds)]
        tensors, mean, square = (pytree.tree_unflatten(leaves, shape) for leaves in news)
        return tensors, AdamState(_next_step(state.step, mask), mean, square)

    return Optimizer(init, update)


def _zero_steps(tensors: Tree, num_edits: int) -> Tensor:
    device = pytree.tree_leaves(tensors)[0].device
    return torch.zeros((num_edits,) if num_edits else (), dtype=torch.float64, device=device)


def _learning_rate(lr: float | Schedule, step: Tensor, scale) -> Tensor:
    rate = lr(step) if callable(lr) else torch.full_like(step, lr)
    return rate * scale


def _broadcast_like(factor: Tensor, x: Tensor) -> Tensor:
    """Reshape a number, or one per edit, so that it multiplies x, which may have an edit axis."""
    return factor.to(x.dtype).reshape(factor.shape + (1,) * (x.ndim - factor.ndim))


def _decay_references(decay_reference: Tree | None, tensors: Tree) -> list[Tensor | None]:
    """Return the decay references of the leaves, in order; a dict may lack names."""
    if decay_reference is None:
        return [None] * len(pytree.tree_leaves(tensors))
    if isinstance(decay_reference, Mapping):
        assert isinstance(tensors, Mapping), "a decay reference in a dict is for tensors in a dict"
        return [decay_reference.get(name) for name in tensors]
    return pytree.tree_leaves(decay_reference)


def _where_active(mask: Tensor | None, new: list[Tensor], old: list[Any]) -> list[Tensor]:
    if mask is None:
        return new
    return [torch.where(_broadcast_like(mask, n).bool(), n, o) for n, o in zip(new, old)]


def _next_step(step: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is None or step.ndim, "a mask needs a step per edit: init(tensors, num_edits=E)"
    return step + 1 if mask is None else step + mask.to(step.dtype)


def _dense_gradients(shape, grads: Tree, leaves: list[Tensor], inplace: bool) -> list[Any]:
    """Return the gradients of the leaves, in order; factors are multiplied out unless in place."""
    leaf_grads = shape.flatten_up_to(grads)
    if inplace:
        return leaf_grads
    return [
        g.to_dense(x.shape[0]) if isinstance(g, FactoredGradient) else g
        for g, x in zip(leaf_grads, leaves)
    ]


def _update_groups(
    step: Tensor, rate: Tensor, mask: Tensor | None, leaves: list[Tensor], grads: list
):
    """Yield (index, learning rate, gradients) per group of edits that one fused update can take.

    All edits are one group if all are active, at one step, with dense gradients. Otherwise each
    active edit is a group, and its gradients are computed one after another in the same memory.
    """
    rates = torch.broadcast_to(rate, step.shape).flatten().tolist()
    steps = step.flatten().tolist()
    active = [True] * len(steps) if mask is None else mask.tolist()
    buffers = [
        torch.empty_like(x[0]) if isinstance(g, FactoredGradient) else None
        for x, g in zip(leaves, grads)
    ]
    all_dense = all(buffer is None for buffer in buffers)
    assert all_dense or step.ndim, (
        "gradients in factors are of stacked tensors: init(..., num_edits=E)"
    )
    if all_dense and all(active) and len(set(steps)) == 1 and len(set(rates)) == 1:
        yield ..., rates[0], list(grads)
        return
    for edit, is_active in enumerate(active):
        if is_active:
            edit_grads = [
                g[edit] if buffer is None else g.write_edit(edit, buffer)
                for g, buffer in zip(grads, buffers)
            ]
            yield edit, rates[edit], edit_grads
