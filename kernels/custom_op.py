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

ONEDNN_MIN_MULTIPLICATIONS = (
    1 << 27
)  # multiplications from which a product is worth oneDNN's compilation


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    twin: str,
    row_arguments: Sequence[int],
) -> Callable[..., Any]:
    """Register `errata::name`: `reference` on every device, the Triton twin on CUDA.

    The op carries no autograd formula: call it on detached tensors. The twin is the function
    `name` of the module `twin`, imported at the first launch, so that Triton may be absent.
    `rows` are the positions of the arguments whose leading axis is the row axis of the outputs:
    a `vmap` over those alone is folded into the rows, any other is a loop.
    """
    op = custom_op(f"errata::{name}", reference, mutates_args=())
    op.register_fake(fake)
    op.register_vmap(_vmap_rule(op, frozenset(row_arguments)))
    if find_spec("triton") is not None:

        @op.register_kernel("cuda")
        def launch(*args: Any) -> Any:
            return getattr(import_module(twin), name)(*args)

    return op


def _vmap_rule(op: Callable[..., Any], row_arguments: frozenset[int]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        batched = {position for position, dim in enumerate(in_dims) if dim is not None}
        args = tuple(arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims))
        if batched <= row_arguments:
            folded_args = [
                arg
                if place not in row_arguments or arg is None
                else (arg if place in batched else arg.expand(size, *arg.shape)).flatten(0, 1)
                for place, arg in enumerate(args)
            ]
            outs = op(*folded_args)
            has_several_outputs = isinstance(outs, tuple)
            folded = [
                out.unflatten(0, (size, -1)) for out in (outs if has_several_outputs else (outs,))
            ]
        else:
            calls = [
                op(*(arg[i] if place in batched else arg for place, arg in enumerate(args)))
                for i in range(size)
            ]
            has_several_outputs = isinstance(calls[0], tuple)
            folded = [
                torch.stack(outs) for outs in (zip(*calls) if has_several_outputs else (calls,))
            ]
        return (tuple(folded), (0,) * len(folded)) if has_several_outputs else (folded[0], 0)

    return rule


def needs_autograd(*tensors: Tensor | None) -> bool:
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


def raise_if_invalid(op: str, problems: Sequence[str]) -> None:
    """Raise one ValueError that lists every violation of the contract of `op`."""
    if problems:
        raise ValueError(f"{op} refuses its arguments: " + "; ".join(problems) + ".")


def device_mismatches(op: str, **tensors: Tensor | None) -> list[str]:
    """The complaint, if any, about tensors that lie on different devices."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) <= 1:
        return []
    placements = ", ".join(f"{name} on {device}" for name, device in devices.items())
    return [f"all tensors must lie on one device, got {placements}"]


def affine(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` in fp32: [B D], [N D], [N] -> [B N].

    A large product on a CPU goes to oneDNN, which reads a tall `weight` for few rows about 1.2 to
    3 times faster than the BLAS behind `torch.mm` does, without a copy of it. A small one does not:
    oneDNN compiles for every new shape (half a millisecond), and pools change theirs.
    """
    is_large = rows.shape[0] * weight.numel() >= ONEDNN_MIN_MULTIPLICATIONS
    if is_large and rows.is_cpu and torch.backends.mkldnn.is_available():
        # oneDNN takes the bias for contiguous, whatever its strides say.
        bias = None if bias is None else bias.contiguous()
        return F.linear(rows.contiguous().to_mkldnn(), weight, bias).to_dense()
    return F.linear(rows, weight, bias)
