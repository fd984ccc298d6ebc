"""What the ops share: registration, the vmap rule, the door's refusals, fp32 products on a CPU."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

LARGE = 1 << 27  # multiplications from which a product is worth oneDNN's compilation


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    twin: str,
    rows: Sequence[int],
) -> Callable[..., Any]:
    """Register `errata::name`: `reference` on every device, the Triton twin on CUDA.

    The op carries no autograd formula: call it on detached tensors. The twin is the function
    `name` of the module `twin`, imported at the first launch, so that Triton may be absent.
    `rows` are the positions of the arguments whose leading axis is the row axis of the outputs:
    a `vmap` over those alone is folded into the rows, any other is a loop.
    """
    op = custom_op(f"errata::{name}", reference, mutates_args=())
    op.register_fake(fake)
    op.register_vmap(_vmap_rule(op, frozenset(rows)))
    if find_spec("triton") is not None:

        @op.register_kernel("cuda")
        def launch(*args: Any) -> Any:
            return getattr(import_module(twin), name)(*args)

    return op


def _vmap_rule(op: Callable[..., Any], rows: frozenset[int]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        batched = {place for place, dim in enumerate(in_dims) if dim is not None}
        args = tuple(arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims))
        if batched <= rows:
            lead = [
                arg
                if place not in rows or arg is None
                else (arg if place in batched else arg.expand(size, *arg.shape)).flatten(0, 1)
                for place, arg in enumerate(args)
            ]
            outs = op(*lead)
            many = isinstance(outs, tuple)
            folded = [out.unflatten(0, (size, -1)) for out in (outs if many else (outs,))]
        else:
            calls = [
                op(*(arg[i] if place in batched else arg for place, arg in enumerate(args)))
                for i in range(size)
            ]
            many = isinstance(calls[0], tuple)
            folded = [torch.stack(outs) for outs in (zip(*calls) if many else (calls,))]
        return (tuple(folded), (0,) * len(folded)) if many else (folded[0], 0)

    return rule


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked of `tensors`: then the plain torch formula must run.

    True in grad mode (which every reverse transform of `torch.func` enters) and for a tensor
    that carries a forward-mode tangent; False under `torch.no_grad` and `inference_mode`.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return any(
        forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor is not None
    )


def refuse(op: str, problems: Sequence[str]) -> None:
    """Raise one ValueError that lists every violation of the contract of `op`."""
    if problems:
        raise ValueError(f"{op} refuses its arguments: " + "; ".join(problems) + ".")


def must_share_device(op: str, **tensors: Tensor | None) -> list[str]:
    """The complaint, if any, about tensors that lie on different devices."""
    where = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(where.values())) <= 1:
        return []
    listed = ", ".join(f"{name} on {device}" for name, device in where.items())
    return [f"all tensors must lie on one device, got {listed}"]


def affine(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` in fp32: [B D], [N D], [N] -> [B N].

    A large product on a CPU goes to oneDNN, which reads a tall `weight` for few rows about 1.2 to
    3 times faster than the BLAS behind `torch.mm` does, without a copy of it. A small one does not:
    oneDNN compiles for every new shape (half a millisecond), and pools change theirs.
    """
    large = rows.shape[0] * weight.numel() >= LARGE
    if large and rows.is_cpu and torch.backends.mkldnn.is_available():
        # oneDNN takes the bias for contiguous, whatever its strides say.
        bias = None if bias is None else bias.contiguous()
        return F.linear(rows.contiguous().to_mkldnn(), weight, bias).to_dense()
    return F.linear(rows, weight, bias)
