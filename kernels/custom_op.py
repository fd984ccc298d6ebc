"""What the ops share: registration, the vmap rule, argument errors, fp32 products on a CPU."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

# A product with fewer multiplications is not worth oneDNN's compilation.
ONEDNN_MIN_MULTIPLICATIONS = 1 << 27


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    twin: str,
    row_arguments: Sequence[int],
) -> Callable[..., Any]:
    """Register `errata::name`: `reference` on every device, the Triton function on CUDA.

    The op has no autograd formula: call it on detached tensors. The Triton function is imported at
    the first launch, so Triton may be absent. A `vmap` over row arguments only is folded into
    the rows; any other `vmap` is a loop.

    Args:
        name: Name of the op, and of the Triton function.
        reference: The plain torch function.
        fake: Function with the same arguments that returns empty outputs of the right shapes.
        twin: Module of the Triton function.
        row_arguments: Positions of the arguments whose leading axis is the row axis of the outputs.

    Returns:
        The op.
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
    """Whether a derivative of `tensors` may be needed, so that the plain torch formula must run.

    True in grad mode (which every reverse transform of `torch.func` enters) and for a tensor
    that carries a forward-mode tangent. False under `torch.no_grad` and `inference_mode`.

    Args:
        *tensors: Differentiable arguments of an op; None is skipped.

    Returns:
        Whether to run the differentiable formula.
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
    """Raise one error that lists all invalid arguments of an op.

    Args:
        op: Name of the op.
        problems: One phrase per invalid argument; none raises nothing.

    Raises:
        ValueError: If there is a problem.
    """
    if problems:
        raise ValueError(f"{op} refuses its arguments: " + "; ".join(problems) + ".")


def device_mismatches(op: str, **tensors: Tensor | None) -> list[str]:
    """Describe tensors that are on different devices.

    Args:
        op: Name of the op; not used.
        **tensors: Tensors by argument name; None is skipped.

    Returns:
        One phrase, or an empty list.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) <= 1:
        return []
    placements = ", ".join(f"{name} on {device}" for name, device in devices.items())
    return [f"all tensors must lie on one device, got {placements}"]


def affine(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `rows @ weight.T + bias` in fp32.

    A large product on a CPU goes to oneDNN. For few rows and a tall `weight` it is about 1.2 to 3
    times faster than the BLAS of `torch.mm`, without a copy of `weight`. A small product does not:
    oneDNN compiles for every new shape (half a millisecond), and the size of a pool changes often.

    Args:
        rows: [B D].
        weight: [N D].
        bias: [N], or None.

    Returns:
        [B N].
    """
    is_large = rows.shape[0] * weight.numel() >= ONEDNN_MIN_MULTIPLICATIONS
    if is_large and rows.is_cpu and torch.backends.mkldnn.is_available():
        # oneDNN assumes a contiguous bias and ignores its strides.
        bias = None if bias is None else bias.contiguous()
        return F.linear(rows.contiguous().to_mkldnn(), weight, bias).to_dense()
    return F.linear(rows, weight, bias)
