"""Compare deltas: how far two are apart, and which edits get in each other's way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import KindUnsupported
from .header import LowRank
from .kinds import Part, algebra, as_dense, inner, parts, rows_of
from .merge import same_base
from .types import Delta

__all__ = ["Conflict", "Difference", "conflicts", "diff"]


class Difference(NamedTuple):
    """How two changes of one parameter differ; norms are Frobenius norms."""

    name: str
    left: float  # |dW|
    right: float  # |dW'|
    apart: float  # |dW - dW'|
    cosine: float  # <dW, dW'> / |dW| |dW'|, 0 where one is nothing


def diff(a: Delta, b: Delta) -> list[Difference]:
    """Compare two deltas parameter by parameter, whatever their kinds; equal changes are 0 apart.

    |dW - dW'|^2 = |dW|^2 - 2 <dW, dW'> + |dW'|^2, from the factors: no low-rank change is
    multiplied out. Raises BaseMismatch for deltas of different bases.
    """
    for delta in (a, b):
        if delta.header.stack:
            raise KindUnsupported("a stacked delta holds edits side by side: unstack it first.")
    same_base([a, b])
    left, right = _by_name(a), _by_name(b)
    found = []
    for name in sorted(left.keys() | right.keys()):
        mine, theirs = left.get(name, []), right.get(name, [])
        aa, bb, ab = (
            float(sum((inner(p, q) for p in one for q in two), torch.zeros(())))
            for one, two in ((mine, mine), (theirs, theirs), (mine, theirs))
        )
        aa, bb = max(aa, 0.0), max(bb, 0.0)
        apart = 0.0 if _identical(mine, theirs) else max(aa - 2 * ab + bb, 0.0)
        cosine = ab / (aa * bb) ** 0.5 if aa and bb else 0.0
        found.append(Difference(name, aa**0.5, bb**0.5, apart**0.5, max(-1.0, min(1.0, cosine))))
    return found


class Conflict(NamedTuple):
    """Two edits that get in each other's way; numbers count through all the deltas, in order."""

    what: str  # "contradicts", "repeats" or "overlaps"
    first: int
    second: int
    ids: tuple[str, str]
    where: str = ""  # the parameter, where keys overlap
    score: float = 1.0  # |cosine| of the nearest keys


def conflicts(*deltas: Delta, overlap: float = 0.9) -> list[Conflict]:
    """Pairs of edits of one or several deltas that address the same thing.

    By their records: same prompt and images with another target ("contradicts") or with the same
    ("repeats"). By their keys: low-rank changes of one parameter whose A rows point the same way,
    |cos| >= `overlap` ("overlaps"): an input that one edit answers to, the other answers too.
    """
    found = []
    records = [edit for delta in deltas for edit in delta.header.edits]
    asked: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for number, edit in enumerate(records):
        if edit.prompt:
            asked.setdefault((edit.prompt, edit.images), []).append(number)
    for group in asked.values():
        for i, j in _pairs(group):
            what = "repeats" if records[i].target == records[j].target else "contradicts"
            found.append(Conflict(what, i, j, (records[i].id, records[j].id)))
    for name, (keys, owners) in _keys(deltas).items():
        unit = torch.nn.functional.normalize(keys.float(), dim=1)  # [R I]
        near: dict[tuple[int, int], float] = {}
        for begin in range(0, len(unit), 1024):
            cosine = (unit[begin : begin + 1024] @ unit.T).abs()
            for i, j in (cosine >= overlap).nonzero().tolist():
                pair = (owners[begin + i], owners[j])
                if pair[0] < pair[1]:
                    near[pair] = max(near.get(pair, 0.0), float(cosine[i, j]))
        found += [
            Conflict("overlaps", i, j, (records[i].id, records[j].id), name, min(score, 1.0))
            for (i, j), score in sorted(near.items())
        ]
    return found


def _keys(deltas: Sequence[Delta]) -> dict[str, tuple[Tensor, list[int]]]:
    """Per parameter: the A rows of all its low-rank changes, and the edit that each belongs to."""
    rows: dict[str, list[Tensor]] = {}
    owners: dict[str, list[int]] = {}
    before = 0
    for delta in deltas:
        for part in parts(delta).values():
            counts = rows_of(part) if isinstance(part.entry, LowRank) else ()
            if counts and not delta.header.stack:
                rows.setdefault(part.entry.name, []).append(part.tensors[".A"])
                mine = [before + k for k, count in enumerate(counts) for _ in range(count)]
                owners.setdefault(part.entry.name, []).extend(mine)
        before += len(delta.header.edits)
    return {name: (torch.cat(found), owners[name]) for name, found in rows.items()}


def _pairs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    return ((i, j) for k, i in enumerate(numbers) for j in numbers[k + 1 :])


def _by_name(delta: Delta) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in parts(delta).values():
        algebra(part.entry)
        found.setdefault(part.entry.name, []).append(part)
    return found


def _identical(left: list[Part], right: list[Part]) -> bool:
    if len(left) != len(right):
        return False
    for one, two in zip(left, right, strict=True):
        if one.tensors.keys() != two.tensors.keys():
            return torch.equal(as_dense(one), as_dense(two))
        if not all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors):
            return False
    return True
