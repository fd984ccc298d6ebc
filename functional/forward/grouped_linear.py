"""One linear map per edit: each row of a batch goes through the matrix of its edit.

    y_b = x_b D_{e(b)}^T,   e(b) = -1: y_b = 0

Rows may be in any order, and an edit may have any number of them. No matrix is copied per row:
rows of one edit are multiplied together. If every edit has as many rows, in order, the whole is
one `bmm`. The two maps below are each other's derivatives, so gradients of any order, `vmap` and
their compositions work. Legend: B rows · L tokens · I in · O out · E edits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["FactoredGradient", "grouped_linear", "low_rank_maps"]


def grouped_linear(x: Tensor, maps: Tensor, edit_index: Tensor) -> Tensor:
    """Multiply each row by the matrix of its edit: `y[b] = x[b] maps[edit_index[b]]^T`.

    Args:
        x: [B L I].
        maps: [E O I].
        edit_index: [B], -1 for a row of zeros.

    Returns:
        [B L O].

    Example:
        >>> maps = torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> grouped_linear(torch.ones(2, 1, 2), maps, torch.tensor([1, -1])).tolist()
        [[[3.0, 3.0]], [[0.0, 0.0]]]
    """
    return _GroupedLinear.apply(x, maps, edit_index)


def low_rank_maps(down: Tensor, up: Tensor, num_edits: int) -> tuple[Tensor, ...]:
    """Return the fp32 maps of x A^T B^T, to be applied in order: (A, B), or B A if it is smaller.

    The rows of many sequential edits outgrow the matrix they change at r > I O / (I + O). From
    there their product costs no more than the map itself, however many edits follow. A delta of one
    edit keeps its factors, so that its result equals PEFT's bit for bit.

    Args:
        down: A [r I].
        up: B [O r].
        num_edits: Edits in the delta.

    Returns:
        One or two matrices, each [out in].

    Example:
        >>> [len(low_rank_maps(torch.ones(9, 4), torch.ones(5, 9), edits)) for edits in (1, 3)]
        [2, 1]
    """
    down, up = down.float(), up.float()
    rank, inner = down.shape
    if num_edits < 2 or rank * (inner + len(up)) <= inner * len(up):
        return down, up
    return (up @ down,)


_MAX_OUTER_PRODUCTS = 8  # tokens up to which outer products are summed one by one
_BLOCK_ELEMENTS = 1 << 20  # elements of a gradient that stay in a CPU's cache


class FactoredGradient(NamedTuple):
    """The gradient of stacked maps as factors: G_e = sum over rows b of edit e of left_b^T right_b.

    An optimizer step needs one G_e at a time, so the stack [E O I] is never in memory.

    Attributes:
        left: [B L O].
        right: [B L I].
        edit_index: [B], the edit of each row.
    """

    left: Tensor
    right: Tensor
    edit_index: Tensor

    def to_dense(self, num_edits: int) -> Tensor:
        """Compute the gradients of all edits.

        Args:
            num_edits: E.

        Returns:
            [E O I].
        """
        return _GroupedOuter.apply(self.left, self.right, self.edit_index, num_edits)

    def write_edit(self, number: int, out: Tensor) -> Tensor:
        """Compute the gradient of one edit in place.

        Args:
            number: The edit.
            out: [O I], overwritten.

        Returns:
            `out`.
        """
        rows = (self.edit_index == number).nonzero()[:, 0]
        left = self.left[rows].flatten(0, 1).to(out.dtype)  # [K O]
        right = self.right[rows].flatten(0, 1).to(out.dtype)  # [K I]
        if not out.is_cpu or not 0 < left.shape[0] <= _MAX_OUTER_PRODUCTS:
            return torch.mm(left.mT, right, out=out)
        # A CPU's GEMM is an order of magnitude off memory speed for so few tokens.
        height = max(1, _BLOCK_ELEMENTS // out.shape[1])
        for begin in range(0, out.shape[0], height):
            out_block, left_block = (
                out[begin : begin + height],
                left[:, begin : begin + height, None],
            )
            torch.mul(left_block[0], right[0], out=out_block)
            for token in range(1, len(left)):
                out_block.addcmul_(left_block[token], right[token])
        return out


class _GroupedLinear(Function):
    """(x [B L I], maps [E O I], edit [B]) -> [B L O]"""

    @staticmethod
    def forward(x, maps, edit_index):
        groups, size = _rows_by_edit(edit_index, maps.shape[0])
        if size:
            return torch.bmm(_merge_rows(x, size), maps.mT).view(*x.shape[:2], -1)
        out = x.new_zeros(*x.shape[:2], maps.shape[1])
        for number, rows in groups.items():
            out[rows] = x[rows] @ maps[number].mT
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, maps, edit_index = ctx.saved_tensors
        input_grad = (
            _GroupedLinear.apply(grad, maps.mT, edit_index) if ctx.needs_input_grad[0] else None
        )
        maps_grad = (
            _GroupedOuter.apply(grad, x, edit_index, maps.shape[0])
            if ctx.needs_input_grad[1]
            else None
        )
        return input_grad, maps_grad, None

    @staticmethod
    def vmap(info, in_dims, x, maps, edit_index):
        size = info.batch_size
        x = _batch_first(x, in_dims[0], size)
        if in_dims[1] is not None:
            maps = maps.movedim(in_dims[1], 0)
            edit_index = _offset_edits(_batch_first(edit_index, in_dims[2], size), maps.shape[1])
            maps = maps.flatten(0, 1)
        else:
            edit_index = _batch_first(edit_index, in_dims[2], size)
        out = _GroupedLinear.apply(x.flatten(0, 1), maps, edit_index.flatten())
        return out.unflatten(0, (size, -1)), 0


class _GroupedOuter(Function):
    """(g [B L O], x [B L I], edit [B], E) -> sum over rows of each edit of g^T x: [E O I]"""

    @staticmethod
    def forward(g, x, edit_index, num_edits):
        groups, size = _rows_by_edit(edit_index, num_edits)
        if size:
            return torch.bmm(_merge_rows(g, size).mT, _merge_rows(x, size))
        out = x.new_zeros(num_edits, g.shape[-1], x.shape[-1])
        for number, rows in groups.items():
            out[number] = g[rows].flatten(0, 1).mT @ x[rows].flatten(0, 1)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx, grad):
        g, x, edit_index = ctx.saved_tensors
        to_g = _GroupedLinear.apply(x, grad, edit_index) if ctx.needs_input_grad[0] else None
        to_x = _GroupedLinear.apply(g, grad.mT, edit_index) if ctx.needs_input_grad[1] else None
        return to_g, to_x, None, None

    @staticmethod
    def vmap(info, in_dims, g, x, edit_index, num_edits):
        size = info.batch_size
        g, x = _batch_first(g, in_dims[0], size), _batch_first(x, in_dims[1], size)
        edit_index = _offset_edits(_batch_first(edit_index, in_dims[2], size), num_edits)
        out = _GroupedOuter.apply(
            g.flatten(0, 1), x.flatten(0, 1), edit_index.flatten(), size * num_edits
        )
        return out.unflatten(0, (size, num_edits)), 0


def _rows_by_edit(edit_index: Tensor, num_edits: int) -> tuple[dict[int, slice | list[int]], int]:
    """Return the rows of each edit, or the number n of rows if all edits have n each, in order."""
    numbers = edit_index.tolist()
    size, rest = divmod(len(numbers), num_edits) if num_edits else (0, 0)
    if size and not rest and numbers == [e for e in range(num_edits) for _ in range(size)]:
        return {}, size
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        if number >= 0:
            rows.setdefault(number, []).append(row)
    runs = {e: slice(r[0], r[-1] + 1) if r[-1] - r[0] + 1 == len(r) else r for e, r in rows.items()}
    return runs, 0


def _merge_rows(x: Tensor, size: int) -> Tensor:
    """[E*n L I] -> [E n*L I]"""
    return x.reshape(-1, size * x.shape[1], x.shape[2])


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _offset_edits(edit_index: Tensor, num_edits: int) -> Tensor:
    """Make edits distinct over the lanes of a vmap: lane n has n*E .. n*E + E - 1."""
    lane = (
        torch.arange(edit_index.shape[0], device=edit_index.device, dtype=torch.int64)[:, None]
        * num_edits
    )
    return torch.where(edit_index < 0, edit_index, edit_index + lane)
