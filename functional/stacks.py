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
from .header import Codebook, EditRecord, Entry, Header, LowRank
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
    tensors = {name: torch.stack([d.tensors[name] for d in deltas]) for name in first.tensors}
    header = msgspec.structs.replace(
        first.header,
        entries=tuple(_together(given) for given in zip(*(d.header.entries for d in deltas))),
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
        entries=tuple(_owned(entry, edits) for entry in delta.header.entries),
        edits=tuple(delta.header.edits[number] for number in edits),
        stack=len(index),
    )
    return Delta(header, {name: t[index.to(t.device)] for name, t in delta.tensors.items()})


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
        entries=tuple(_own(entry, delta.header, number) for entry in delta.header.entries),
        edits=delta.header.edits[number : number + 1],
        stack=0,
    )
    return Delta(header, {name: tensor[number] for name, tensor in delta.tensors.items()})


def _own(entry: Entry, header: Header, number: int) -> Entry:
    """An entry of a stacked delta as it reads in one edit's own delta."""
    entry = _owned(entry, [number])
    if isinstance(entry, LowRank) and not header.recursive:
        return msgspec.structs.replace(entry, rows=(entry.rank,))
    return entry


def _shared(entry: Entry) -> Entry:
    if isinstance(entry, Codebook):
        return msgspec.structs.replace(entry, owners=())
    return msgspec.structs.replace(entry, rows=()) if isinstance(entry, LowRank) else entry


def _together(given: Sequence[Entry]) -> Entry:
    """The same entry of several deltas as it reads in a stacked one."""
    if isinstance(given[0], Codebook):
        owners = tuple((e.owners or (-1,))[-1] for e in given if isinstance(e, Codebook))
        return msgspec.structs.replace(given[0], owners=owners)
    return _shared(given[0])


def _owned(entry: Entry, edits: Sequence[int]) -> Entry:
    """An entry with the keys of these edits only."""
    if isinstance(entry, Codebook):
        return msgspec.structs.replace(entry, owners=tuple(entry.owners[k] for k in edits))
    return entry


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
    if [_shared(e) for e in mine.entries] != [_shared(e) for e in other.entries]:
        faults.append(f"delta {number} has other entries")
    elif {n: t.shape for n, t in first.tensors.items()} != {
        n: t.shape for n, t in delta.tensors.items()
    }:
        faults.append(f"delta {number} has tensors of other shapes")
    return faults
