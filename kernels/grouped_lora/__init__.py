"""A batch whose rows run under different edits: a low-rank change of a linear per row.

Legend: B rows · L tokens · I, O input and output widths · E edits · R rank
"""

from torch import Tensor

from errata.kernels import custom_op
from errata.kernels.grouped_lora import ref

__all__ = ["apply_grouped_lora"]


def _fake(x: Tensor, down: Tensor, up: Tensor, edit_index: Tensor, base: Tensor | None) -> Tensor:
    like = x if base is None else base
    return like.new_empty((*x.shape[:2], up.shape[1]))


_grouped_lora_op = custom_op.register(
    "grouped_lora",
    ref.grouped_lora,
    _fake,
    twin="errata.kernels.grouped_lora.triton",
    row_arguments=(0, 3, 4),
)


def apply_grouped_lora(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    edit_index: Tensor,
    base: Tensor | None = None,
) -> Tensor:
    """Add to each row of a batch the output of its own low-rank change of a linear.

    `y_b = base_b + (x_b A_e^T) B_e^T` with `e = edit_index_b`; `base` is the model's own `x W^T`.

    Computed in fp32 and rounded once. A row with edit -1 gets the bits of `base`, or zero. Under
    `torch.no_grad` the compiled op runs. If a gradient may be needed, the same formula runs in
    plain torch and supports every transform of `torch.func`.

    Args:
        x: [B L I].
        down: [E R I], the factors `A`; E may be 0.
        up: [E O R], the factors `B`.
        edit_index: [B] integers in -1 .. E-1. The range is not checked: that would wait for the
            device.
        base: [B L O], what the change is added to.

    Returns:
        [B L O], in the dtype of `base`, or of `x` without one.

    Raises:
        ValueError: If shapes, devices or the dtype of `edit_index` do not fit.

    References:
        The batched form of LoRA (arXiv 2106.09685), as in Punica (arXiv 2310.18547) and S-LoRA.

    Example:
        >>> import torch
        >>> x, down, up = torch.ones(2, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 3, 1)
        >>> apply_grouped_lora(x, down, up, torch.tensor([0, -1]))[:, 0]
        tensor([[2., 2., 2.],
                [0., 0., 0.]])
    """
    problems = [] if x.ndim == 3 else [f"x must be [B L I], got {list(x.shape)}"]
    if down.ndim != 3 or down.shape[-1] != x.shape[-1]:
        problems.append(f"down must be [E R {x.shape[-1]}], got {list(down.shape)}")
    elif up.ndim != 3 or (up.shape[0], up.shape[2]) != (down.shape[0], down.shape[1]):
        factors = f"[{down.shape[0]} O {down.shape[1]}]"
        problems.append(f"up must be {factors}, got {list(up.shape)}")
    if edit_index.shape != x.shape[:1] or edit_index.dtype.is_floating_point:
        problems.append(
            f"edit_index must be [{x.shape[0]}] integers, got {list(edit_index.shape)} "
            f"{edit_index.dtype}"
        )
    if base is not None and list(base.shape) != [*x.shape[:2], up.shape[1]]:
        shape = [*x.shape[:2], up.shape[1]]
        problems.append(f"base must be {shape}, got {list(base.shape)}")
    problems += custom_op.device_mismatches(
        "apply_grouped_lora", x=x, down=down, up=up, edit_index=edit_index
    )
    custom_op.raise_if_invalid("apply_grouped_lora", problems)

    tensors = (x, down, up, edit_index.long(), base)
    if custom_op.needs_autograd(x, down, up, base):
        return ref.grouped_lora_differentiable(*tensors)
    return _grouped_lora_op(*(tensor if tensor is None else tensor.detach() for tensor in tensors))
