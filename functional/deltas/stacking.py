"""Stacked deltas: independent edits of one layout along a leading axis.

Each row of a batch names its edit (`Batch.edit_index`), so one decode runs many edited models.
Legend: E edits · B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from errata.functional.errors import ShapeError, UnsupportedKindError, join_messages
from errata.functional.header import EditRecord, Header
from errata.functional.types import Delta

__all__ = ["select_edits", "stack", "unstack"]


def stack(deltas: Sequence[Delta]) -> Delta:
    """Stack deltas of one layout, each as one edit.

    A delta that holds several edits becomes one, under the record of its last.

    Args:
        deltas: Deltas that agree in base, arithmetic, entries and tensor shapes.

    Returns:
        The stacked delta.

    Raises:
        ShapeError: If there are none, or if they differ. Lists every difference.

    Example:
        >>> from errata.functional import BaseModel, EditRecord, Header
        >>> from errata.functional.kinds.schema import Dense
        >>> entry = Dense(name="w", checkpoint_name="w", shape=(2,))
        >>> one = Delta(
        ...     Header(base=BaseModel(id="a/model"), entries=(entry,), edits=(EditRecord(id="0"),)),
        ...     {"w": torch.ones(2)},
        ... )
        >>> stack([one, one, one]).tensors["w"].shape
        torch.Size([3, 2])
    """
    if not deltas:
        raise ShapeError("stack needs at least one delta, got none.")
    first = deltas[0]
    differences = [
        difference for n, delta in enumerate(deltas) for difference in _differences(n, first, delta)
    ]
    if differences:
        raise ShapeError(
            f"deltas must agree in layout to be stacked: {join_messages(differences)}."
        )
    shared = _shared_tensors(first)
    tensors = {
        name: tensor if name in shared else torch.stack([d.tensors[name] for d in deltas])
        for name, tensor in first.tensors.items()
    }
    header = msgspec.structs.replace(
        first.header,
        entries=tuple(
            type(same_entries[0]).stack(same_entries)
            for same_entries in zip(*(d.header.entries for d in deltas))
        ),
        edits=tuple(_last_record(delta.header) for delta in deltas),
        stack=len(deltas),
        shared_edits=(),
        replaced_edits=(),
    )
    return Delta(header, tensors)


def unstack(delta: Delta) -> list[Delta]:
    """Split a stacked delta into its edits, each as if made alone.

    Edits that were made on top of earlier ones hold these too.

    Args:
        delta: A stacked delta.

    Returns:
        One delta per edit; tensors are views.

    Raises:
        UnsupportedKindError: If the delta is not stacked.
    """
    _require_stacked(delta)
    return [_unstack_one(delta, number) for number in range(delta.header.stack)]


def select_edits(delta: Delta, edits: Sequence[int]) -> Delta:
    """Select edits of a stacked delta, in the order given.

    Args:
        delta: A stacked delta.
        edits: Numbers of the edits.

    Returns:
        A stacked delta.

    Raises:
        UnsupportedKindError: If the delta is not stacked.
    """
    _require_stacked(delta)
    index = torch.tensor(list(edits), dtype=torch.int64, device="cpu")
    header = msgspec.structs.replace(
        delta.header,
        entries=tuple(entry.select(edits) for entry in delta.header.entries),
        edits=tuple(delta.header.edits[number] for number in edits),
        stack=len(index),
        replaced_edits=tuple(delta.header.replaced_edits[number] for number in edits)
        if delta.header.replaced_edits
        else (),
    )
    shared = _shared_tensors(delta)
    tensors = {
        name: tensor if name in shared else tensor[index.to(tensor.device)]
        for name, tensor in delta.tensors.items()
    }
    return Delta(header, tensors)


def _require_stacked(delta: Delta) -> None:
    if not delta.header.stack:
        raise UnsupportedKindError(
            f"this needs a stacked delta, and one of {len(delta.header.edits)} edit(s) by "
            f"{delta.header.editor or 'an unnamed editor'} is not: make it with `stack` or "
            "`edit_each`."
        )


def _unstack_one(delta: Delta, number: int) -> Delta:
    header = msgspec.structs.replace(
        delta.header,
        entries=tuple(entry.unstack(delta.header, number) for entry in delta.header.entries),
        edits=delta.header.shared_edits + delta.header.edits[number : number + 1],
        stack=0,
        shared_edits=(),
        replaced_edits=(),
    )
    shared = _shared_tensors(delta)
    tensors = {
        name: tensor if name in shared else tensor[number] for name, tensor in delta.tensors.items()
    }
    return Delta(header, tensors)


def _shared_tensors(delta: Delta) -> frozenset[str]:
    return frozenset().union(*(entry.shared_tensors() for entry in delta.header.entries))


def _last_record(header: Header) -> EditRecord:
    return header.edits[-1] if header.edits else EditRecord(id="")


def _differences(number: int, first: Delta, delta: Delta) -> list[str]:
    first_header, header = first.header, delta.header
    differences = []
    if header.stack:
        differences.append(f"delta {number} is stacked already")
    for what in ("base", "arithmetic"):
        if getattr(first_header, what) != getattr(header, what):
            differences.append(f"delta {number} has another {what}")
    if [e.layout() for e in first_header.entries] != [e.layout() for e in header.entries]:
        differences.append(f"delta {number} has other entries")
    elif {n: t.shape for n, t in first.tensors.items()} != {
        n: t.shape for n, t in delta.tensors.items()
    }:
        differences.append(f"delta {number} has tensors of other shapes")
    else:
        differences += [
            f"delta {number} has another {name}, which edits side by side must share"
            for name in sorted(_shared_tensors(first))
            if not torch.equal(first.tensors[name], delta.tensors[name])
        ]
    return differences
