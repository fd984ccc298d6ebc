"""Compare deltas: how far apart two are, and which edits conflict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errata.functional.deltas.merging import require_same_base
from errata.functional.deltas.weight_change import inner_product, to_dense
from errata.functional.errors import UnsupportedKindError
from errata.functional.kinds.common.algebra import EntryTensors, entries_of
from errata.functional.kinds.lowrank.algebra import ranks_per_edit
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.types import Delta

__all__ = ["Conflict", "Difference", "conflicts", "diff"]


class Difference(NamedTuple):
    """How two changes of one parameter differ; norms are Frobenius norms.

    Attributes:
        name: The parameter.
        norm_a: |dW|.
        norm_b: |dW'|.
        distance: |dW - dW'|.
        cosine: <dW, dW'> / |dW| |dW'|, 0 if one of them is zero.
    """

    name: str
    norm_a: float
    norm_b: float
    distance: float
    cosine: float


def diff(a: Delta, b: Delta) -> list[Difference]:
    """Compare two deltas parameter by parameter.

    |dW - dW'|^2 = |dW|^2 - 2 <dW, dW'> + |dW'|^2, computed from the factors. Two low-rank changes
    are never multiplied out.

    Args:
        a: A delta of kinds `dense` and `lowrank`.
        b: A delta of the same base.

    Returns:
        One `Difference` per parameter. Equal changes have distance 0.

    Raises:
        BaseMismatchError: If the deltas have different bases.
        UnsupportedKindError: If a delta is stacked, or a kind decides per input what to change.
    """
    for delta in (a, b):
        if delta.header.stack:
            raise UnsupportedKindError(
                "a stacked delta holds edits side by side: unstack it first."
            )
    require_same_base([a, b])
    entries_a, entries_b = _entries_by_name(a), _entries_by_name(b)
    differences = []
    for name in sorted(entries_a.keys() | entries_b.keys()):
        changes_a, changes_b = entries_a.get(name, []), entries_b.get(name, [])
        aa, bb, ab = (
            float(
                sum(
                    (inner_product(p, q) for p in one for q in two),
                    torch.zeros((), dtype=torch.float32, device="cpu"),
                )
            )
            for one, two in ((changes_a, changes_a), (changes_b, changes_b), (changes_a, changes_b))
        )
        aa, bb = max(aa, 0.0), max(bb, 0.0)
        squared_distance = 0.0 if _identical(changes_a, changes_b) else max(aa - 2 * ab + bb, 0.0)
        cosine = ab / (aa * bb) ** 0.5 if aa and bb else 0.0
        differences.append(
            Difference(name, aa**0.5, bb**0.5, squared_distance**0.5, max(-1.0, min(1.0, cosine)))
        )
    return differences


class Conflict(NamedTuple):
    """Two edits that conflict. Edits are numbered through all the deltas, in order.

    Attributes:
        kind: "contradiction", "duplicate" or "overlap".
        edit_a: Number of the first edit.
        edit_b: Number of the second edit.
        ids: Their ids.
        parameter: The parameter whose keys overlap, "" for the other kinds.
        score: |cosine| of the nearest keys, 1 for the other kinds.
    """

    kind: str
    edit_a: int
    edit_b: int
    ids: tuple[str, str]
    parameter: str = ""
    score: float = 1.0


def conflicts(*deltas: Delta, overlap: float = 0.9) -> list[Conflict]:
    """List pairs of edits that address the same thing.

    By their records: the same prompt and images with another target ("contradiction") or the same
    target ("duplicate"). By their keys: low-rank changes of one parameter whose A rows have
    |cos| >= `overlap` ("overlap"), so an input that triggers one edit triggers the other.

    Args:
        *deltas: One or several deltas.
        overlap: Smallest |cosine| at which two edits overlap.

    Returns:
        Contradictions and duplicates, then overlaps by parameter.
    """
    found_conflicts = []
    records = [edit for delta in deltas for edit in delta.header.edits]
    by_question: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for number, edit in enumerate(records):
        if edit.prompt:
            by_question.setdefault((edit.prompt, edit.images), []).append(number)
    for group in by_question.values():
        for i, j in _pairs(group):
            kind = "duplicate" if records[i].target == records[j].target else "contradiction"
            found_conflicts.append(Conflict(kind, i, j, (records[i].id, records[j].id)))
    for name, (keys, key_edits) in _lowrank_keys(deltas).items():
        unit = torch.nn.functional.normalize(keys.float(), dim=1)  # [R I]
        pair_scores: dict[tuple[int, int], float] = {}
        for begin in range(0, len(unit), 1024):
            cosine = (unit[begin : begin + 1024] @ unit.T).abs()
            for i, j in (cosine >= overlap).nonzero().tolist():
                pair = (key_edits[begin + i], key_edits[j])
                if pair[0] < pair[1]:
                    pair_scores[pair] = max(pair_scores.get(pair, 0.0), float(cosine[i, j]))
        found_conflicts += [
            Conflict("overlap", i, j, (records[i].id, records[j].id), name, min(score, 1.0))
            for (i, j), score in sorted(pair_scores.items())
        ]
    return found_conflicts


def _lowrank_keys(deltas: Sequence[Delta]) -> dict[str, tuple[Tensor, list[int]]]:
    """Return per parameter the A rows of all its low-rank changes, and the edit of each row."""
    key_rows: dict[str, list[Tensor]] = {}
    key_edits: dict[str, list[int]] = {}
    num_earlier = 0
    for delta in deltas:
        for part in entries_of(delta).values():
            counts = ranks_per_edit(part) if isinstance(part.entry, LowRank) else ()
            if counts and not delta.header.stack:
                key_rows.setdefault(part.entry.name, []).append(part.tensors[".A"])
                edit_numbers = [
                    num_earlier + k for k, count in enumerate(counts) for _ in range(count)
                ]
                key_edits.setdefault(part.entry.name, []).extend(edit_numbers)
        num_earlier += len(delta.header.edits)
    return {name: (torch.cat(found), key_edits[name]) for name, found in key_rows.items()}


def _pairs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    return ((i, j) for k, i in enumerate(numbers) for j in numbers[k + 1 :])


def _entries_by_name(delta: Delta) -> dict[str, list[EntryTensors]]:
    entries: dict[str, list[EntryTensors]] = {}
    for part in entries_of(delta).values():
        entries.setdefault(part.entry.name, []).append(part)
    return entries


def _identical(left: list[EntryTensors], right: list[EntryTensors]) -> bool:
    if len(left) != len(right):
        return False
    for one, two in zip(left, right, strict=True):
        if one.tensors.keys() != two.tensors.keys():
            return torch.equal(to_dense(one), to_dense(two))
        if not all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors):
            return False
    return True
