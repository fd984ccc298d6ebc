"""Stacked deltas: many independent edits of one layout, side by side along a leading axis.

Each row of a batch names its edit (`Batch.edit`), so one decode carries many edited models.
Legend: E edits · B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from . import rows
from .errors import KindUnsupported, ShapeMismatch, listed
from .header import EditRecord, Header
from .types import Batch, Delta

__all__ = ["per_edit", "spread", "stack", "take", "unstack"]


def stack(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one layout as one stacked delta, each an edit of its own.

    A delta that holds several edits becomes one, under the record of its last. Raises
    ShapeMismatch, listing every difference, unless base, form, entries and tensors agree.

    >>> from errata.functional import Base, Dense, EditRecord, Header
    >>> entry = Dense(name="w", checkpoint="w", shape=(2,))
    >>> one = Delta(
    ...     Header(base=Base(id="a/model"), entries=(entry,), edits=(EditRecord(id="0"),)),
    ...     {"w": torch.ones(2)},
    ... )
    >>> stack([one, one, one]).tensors["w"].shape
    torch.Size([3, 2])
    """
    if not deltas:
        raise ShapeMismatch("stack needs at least one delta, got none.")
    first = deltas[0]
    faults = [f for n, delta in enumerate(deltas) for f in _differences(n, first, delta)]
    if faults:
        raise ShapeMismatch(f"deltas must agree in layout to be stacked: {listed(faults)}.")
    common = _common(first)
    tensors = {
        name: tensor if name in common else torch.stack([d.tensors[name] for d in deltas])
        for name, tensor in first.tensors.items()
    }
    header = msgspec.structs.replace(
        first.header,
        entries=tuple(
            type(given[0]).stacked(given) for given in zip(*(d.header.entries for d in deltas))
        ),
        edits=tuple(_one(delta.header) for delta in deltas),
        stack=len(deltas),
    )
    return Delta(header, tensors)


def unstack(delta: Delta) -> list[Delta]:
    """The edits of a stacked delta, each as if made alone; its tensors are views.

    Raises KindUnsupported for a delta that is not stacked.
    """
    _must_be_stacked(delta)
    return [_alone(delta, number) for number in range(delta.header.stack)]


def take(delta: Delta, edits: Sequence[int]) -> Delta:
    """Some edits of a stacked delta, in the order given, as a stacked delta."""
    _must_be_stacked(delta)
    index = torch.tensor(list(edits), dtype=torch.int64)
    header = msgspec.structs.replace(
        delta.header,
        entries=tuple(entry.picked(edits) for entry in delta.header.entries),
        edits=tuple(delta.header.edits[number] for number in edits),
        stack=len(index),
    )
    common = _common(delta)
    tensors = {
        name: tensor if name in common else tensor[index.to(tensor.device)]
        for name, tensor in delta.tensors.items()
    }
    return Delta(header, tensors)


def spread(batch: Batch, num_edits: int) -> Batch:
    """Every row under every edit: E*B rows, ordered by edit."""
    index = torch.arange(batch.rows, device=batch.edit.device).repeat(num_edits)
    edit = torch.arange(num_edits, device=batch.edit.device).repeat_interleave(batch.rows)
    return rows.take(batch, index)._replace(edit=edit)


def per_edit(values: Tensor, edit: Tensor, num_edits: int) -> Tensor:
    """Mean of values [B] over the rows of each edit: [E]; rows of edit -1 count nowhere.

    >>> per_edit(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1, 1, 0]), 2)
    tensor([5., 2.])
    """
    home = torch.where(edit < 0, num_edits, edit)
    total = values.new_zeros(num_edits + 1).index_add(0, home, values)
    count = values.new_zeros(num_edits + 1).index_add(0, home, torch.ones_like(values))
    return (total / count.clamp_min(1))[:num_edits]


def _must_be_stacked(delta: Delta) -> None:
    if not delta.header.stack:
        raise KindUnsupported(
            f"this needs a stacked delta, and one of {len(delta.header.edits)} edit(s) by "
            f"{delta.header.editor or 'an unnamed editor'} is not: make it with `stack` or `each`."
        )


def _alone(delta: Delta, number: int) -> Delta:
    header = msgspec.structs.replace(
        delta.header,
        entries=tuple(entry.alone(delta.header, number) for entry in delta.header.entries),
        edits=delta.header.edits[number : number + 1],
        stack=0,
    )
    common = _common(delta)
    tensors = {
        name: tensor if name in common else tensor[number] for name, tensor in delta.tensors.items()
    }
    return Delta(header, tensors)


def _common(delta: Delta) -> frozenset[str]:
    return frozenset().union(*(entry.common() for entry in delta.header.entries))


def _one(header: Header) -> EditRecord:
    return header.edits[-1] if header.edits else EditRecord(id="")


def _differences(number: int, first: Delta, delta: Delta) -> list[str]:
    mine, other = first.header, delta.header
    faults = []
    if other.stack:
        faults.append(f"delta {number} is stacked already")
    for what in ("base", "form"):
        if getattr(mine, what) != getattr(other, what):
            faults.append(f"delta {number} has another {what}")
    if [e.shared() for e in mine.entries] != [e.shared() for e in other.entries]:
        faults.append(f"delta {number} has other entries")
    elif {n: t.shape for n, t in first.tensors.items()} != {
        n: t.shape for n, t in delta.tensors.items()
    }:
        faults.append(f"delta {number} has tensors of other shapes")
    else:
        faults += [
            f"delta {number} has another {name}, which edits side by side must share"
            for name in sorted(_common(first))
            if not torch.equal(first.tensors[name], delta.tensors[name])
        ]
    return faults
