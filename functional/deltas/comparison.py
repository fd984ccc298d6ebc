"""Compare deltas: how far apart two are, and which edits conflict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from errata.functional.deltas.merging import require_same_base
from errata.functional.deltas.weight_change import inner_product, to_dense
from errata.functional.errors import UnsupportedKindError
from errata.functional.hashing import hash_parameter
from errata.functional.header import SlotEntry
from errata.functional.kinds.common.algebra import EntryTensors, entries_of
from errata.functional.kinds.lowrank.algebra import ranks_per_edit
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.kinds.table import KINDS
from errata.functional.types import Delta

__all__ = [
    "Conflict",
    "Difference",
    "EditLists",
    "SlotDifference",
    "compare_edits",
    "compare_slots",
    "conflicts",
    "diff",
]


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
    """Compare the weight changes of two deltas, parameter by parameter.

    Kinds that decide per input what to change are left out; see `compare_slots`.

    |dW - dW'|^2 = |dW|^2 - 2 <dW, dW'> + |dW'|^2, computed from the factors. Two low-rank changes
    are never multiplied out.

    Args:
        a: A delta.
        b: A delta of the same base.

    Returns:
        One `Difference` per parameter. Equal changes have distance 0.

    Raises:
        BaseMismatchError: If the deltas have different bases.
        UnsupportedKindError: If a delta is stacked.
    """
    _require_comparable(a, b)
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


class SlotDifference(NamedTuple):
    """How two memories of one site differ.

    Attributes:
        name: The parameter or site.
        kind: `codebook`, `masked`, `experts`, `prompt` or `scope`.
        num_a: Slots (keys, memories, experts, facts) of the first.
        num_b: Slots of the second.
        num_equal: Slots that both have, value for value.
        same_settings: Whether all that the slots share is equal.
    """

    name: str
    kind: str
    num_a: int
    num_b: int
    num_equal: int
    same_settings: bool


def compare_slots(a: Delta, b: Delta) -> list[SlotDifference]:
    """Compare the memories of two deltas: kinds that decide per input what to change.

    Args:
        a: A delta.
        b: A delta of the same base.

    Returns:
        One difference per site and kind.

    Raises:
        BaseMismatchError: If the deltas have different bases.
        UnsupportedKindError: If a delta is stacked.
    """
    _require_comparable(a, b)
    parts_a, parts_b = (
        {key: part for key, part in entries_of(delta).items() if isinstance(part.entry, SlotEntry)}
        for delta in (a, b)
    )
    differences = []
    for name, kind in sorted(parts_a.keys() | parts_b.keys()):
        part_a, part_b = parts_a.get((name, kind)), parts_b.get((name, kind))
        slots_a, slots_b = _slot_digests(part_a), _slot_digests(part_b)
        same = part_a is not None and part_b is not None and _shared(part_a) == _shared(part_b)
        differences.append(
            SlotDifference(
                name,
                kind.lower(),
                slots_a.total(),
                slots_b.total(),
                (slots_a & slots_b).total(),
                same,
            )
        )
    return differences


def _slot_digests(part: EntryTensors | None) -> Counter[str]:
    """How often each content occurs among the slots of an entry."""
    if part is None:
        return Counter()
    owners: dict[int, list[int]] = {}
    for edit, slot in enumerate(part.entry.edit_slots):
        if slot >= 0:
            owners.setdefault(slot, []).append(edit)
    shared = {name.removeprefix(part.entry.name) for name in part.entry.shared_tensors()}
    digests: Counter[str] = Counter()
    for edits in owners.values():
        single = KINDS[type(part.entry)].algebra.select(part, edits)
        assert single is not None
        own = [(suffix, x) for suffix, x in sorted(single.tensors.items()) if suffix not in shared]
        text = [f"{suffix} {hash_parameter(x.contiguous())}" for suffix, x in own]
        digests["\n".join([*text, *getattr(single.entry, "facts", ())])] += 1
    return digests


def _shared(part: EntryTensors) -> tuple[Any, ...]:
    """What all slots of an entry share: its settings and tensors."""
    sizes = {"num_keys", "num_values", "num_experts", "num_slots", "num_facts", "facts"}
    sizes |= {"max_answer_tokens", "max_prompt_tokens", "num_images", "image_bytes"}
    fields = {n: v for n, v in msgspec.to_builtins(part.entry).items() if n not in sizes}
    fields |= {"edit_slots": (), "shared_slots": ()}
    names = sorted(name.removeprefix(part.entry.name) for name in part.entry.shared_tensors())
    return fields, [hash_parameter(part.tensors[name].contiguous()) for name in names]


class EditLists(NamedTuple):
    """Ids of the edits of two deltas.

    Attributes:
        only_a: Those of the first alone.
        only_b: Those of the second alone.
        both: Those of both.
    """

    only_a: list[str]
    only_b: list[str]
    both: list[str]


def compare_edits(a: Delta, b: Delta) -> EditLists:
    """Compare the lists of edits of two deltas.

    Args:
        a: A delta.
        b: Another one.

    Returns:
        Ids, each in the order of its delta.
    """
    ids_a, ids_b = ([edit.id for edit in delta.header.edits] for delta in (a, b))
    return EditLists(
        [id for id in ids_a if id not in ids_b],
        [id for id in ids_b if id not in ids_a],
        [id for id in ids_a if id in ids_b],
    )


def _require_comparable(a: Delta, b: Delta) -> None:
    for delta in (a, b):
        if delta.header.stack:
            raise UnsupportedKindError(
                f"a stacked delta holds {delta.header.stack} independent edits: compare one of "
                "them, see `stacking.unstack`."
            )
    require_same_base([a, b])


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
        if part.entry.is_weight_change():
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
