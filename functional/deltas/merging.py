"""The algebra of deltas: merge, scale, select, remove, compress.

All functions are pure: they return new deltas. Legend: E edits · r rank · O out · I in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from errata.functional.card import BaseModel
from errata.functional.deltas.stacking import select_edits
from errata.functional.errors import (
    BaseMismatchError,
    InvalidInputError,
    UnsupportedKindError,
    join_messages,
)
from errata.functional.header import EditRecord, Header
from errata.functional.kinds.common.algebra import EntryTensors, entries_of
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.kinds.table import KINDS
from errata.functional.types import Delta

__all__ = [
    "Compressed",
    "compress",
    "merge",
    "remove",
    "require_same_base",
    "scale",
    "select",
]


def merge(*deltas: Delta, allow_conflicts: bool = False) -> Delta:
    """Merge deltas into one that applies all of them: W + dW_1 + dW_2 + ...

    Low-rank changes are concatenated, `B A + B' A' = [B B'] [A; A']`. That is exact and keeps the
    rows of each edit, so `remove` is exact too. Dense changes are summed. Entries are sorted by
    name.

    Args:
        *deltas: Deltas of one base.
        allow_conflicts: Whether two of them may teach one question different answers.

    Returns:
        The merged delta.

    Raises:
        BaseMismatchError: If the deltas have different bases.
        InvalidInputError: If there are none, if dtypes, arithmetics or shapes differ, or if edits
            contradict each other.
        UnsupportedKindError: If a kind cannot be merged.

    References:
        Ilharco et al. 2023, "Editing Models with Task Arithmetic", arXiv:2212.04089.

    Example:
        >>> from errata.functional import EditRecord
        >>> entry = LowRank(name="w", checkpoint_name="w", shape=(2, 3), rank=1, edit_ranks=(1,))
        >>> edits = (EditRecord(id="cat"),)
        >>> header = Header(base=BaseModel(id="a/model"), entries=(entry,), edits=edits)
        >>> cat = Delta(header, {"w.A": torch.ones(1, 3), "w.B": torch.ones(2, 1)})
        >>> both = merge(cat, scale(cat, 0.5))
        >>> both.header.entries[0].edit_ranks, both.tensors["w.B"].tolist()
        ((1, 1), [[1.0, 0.5], [1.0, 0.5]])
        >>> remove(both, [1]).tensors["w.B"].tolist()
        [[1.0], [1.0]]
    """
    if not deltas:
        raise InvalidInputError("merge needs at least one delta, got none.")
    _require_mergeable(deltas)
    if not allow_conflicts:
        _refuse_contradictions(deltas)
    first = deltas[0].header
    delta_entries = [entries_of(delta) for delta in deltas]
    merged = []
    for key in sorted({key for entries_by_key in delta_entries for key in entries_by_key}):
        same_entries = [
            mine.get(key, len(d.header.edits))
            for mine, d in zip(delta_entries, deltas, strict=True)
        ]
        sample = next(part for part in same_entries if isinstance(part, EntryTensors))
        merged.append(KINDS[type(sample.entry)].algebra.merge(same_entries))
    parameter_hashes: dict[str, str] = {}
    for delta in deltas:
        parameter_hashes |= delta.header.base.parameter_hashes
    same_settings = all(
        (d.header.editor, d.header.settings) == (first.editor, first.settings) for d in deltas
    )
    editors = {name for delta in deltas for name in delta.header.editor.split("+") if name}
    header = msgspec.structs.replace(
        first,
        editor=first.editor if same_settings else "+".join(sorted(editors)),
        settings=first.settings if same_settings else {},
        base=msgspec.structs.replace(
            first.base, parameter_hashes=dict(sorted(parameter_hashes.items()))
        ),
        arithmetic=_arithmetic_of(deltas),
        edits=tuple(edit for delta in deltas for edit in delta.header.edits),
        # a single edit depends on no other, however it was made
        order_dependent=any(d.header.order_dependent and len(d.header.edits) > 1 for d in deltas),
    )
    return _assemble_delta(header, merged)


def scale(delta: Delta, factor: float) -> Delta:
    """Scale the strength of an edit: W + factor * dW. Low-rank changes carry the factor in B.

    Args:
        delta: The delta.
        factor: A finite number.

    Returns:
        The scaled delta.

    Raises:
        InvalidInputError: If the factor is not finite.
        UnsupportedKindError: If a kind cannot be scaled.
    """
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        raise InvalidInputError(f"a delta is scaled by a finite number, got {factor!r}.")
    entries = entries_of(delta).values()
    return _assemble_delta(
        delta.header, [KINDS[type(part.entry)].algebra.scale(part, factor) for part in entries]
    )


def select(delta: Delta, edits: Iterable[int | str]) -> Delta:
    """Keep only some edits of a delta, in the delta's order.

    Exact for additive kinds and for stacked deltas.

    Args:
        delta: The delta.
        edits: Numbers or ids of the edits to keep. With none, the result changes nothing.

    Returns:
        The delta with these edits.

    Raises:
        UnsupportedKindError: If edits depend on one another or cannot be separated.
        InvalidInputError: If an edit is not in the delta.
    """
    numbers = _edit_numbers(delta.header, edits)
    header = delta.header
    records = tuple(header.edits[k] for k in numbers)
    if not numbers:
        base = msgspec.structs.replace(header.base, parameter_hashes={})
        return _assemble_delta(msgspec.structs.replace(header, base=base, edits=(), stack=0), [])
    if header.stack:
        return select_edits(delta, numbers)
    if header.order_dependent and len(numbers) < len(header.edits):
        raise UnsupportedKindError(
            "each edit of this delta was computed on top of those before it, so taking one out "
            "would leave the later ones wrong: edit again without it, or undo the whole delta."
        )
    selected = [
        KINDS[type(part.entry)].algebra.select(part, numbers) for part in entries_of(delta).values()
    ]
    remaining = [part for part in selected if part is not None]
    names = {part.entry.name for part in remaining}
    parameter_hashes = {
        name: sha for name, sha in header.base.parameter_hashes.items() if name in names
    }
    base = msgspec.structs.replace(header.base, parameter_hashes=parameter_hashes)
    return _assemble_delta(msgspec.structs.replace(header, base=base, edits=records), remaining)


def remove(delta: Delta, edits: Iterable[int | str]) -> Delta:
    """Remove edits from a delta: `select` of the others, with the same guarantees.

    For low-rank deltas, merge(a, b, c) without b's edit is merge(a, c), bit for bit.

    Args:
        delta: The delta.
        edits: Numbers or ids of the edits to remove.

    Returns:
        The delta without them.

    Raises:
        UnsupportedKindError: If edits depend on one another or cannot be separated.
        InvalidInputError: If an edit is not in the delta.
    """
    removed = set(_edit_numbers(delta.header, edits))
    return select(delta, [k for k in range(len(delta.header.edits)) if k not in removed])


class Compressed(NamedTuple):
    """A delta of lower rank.

    Attributes:
        delta: The delta.
        lost_energy: Parameter name -> lost share of the change's energy (squared norm), 0 to 1.
    """

    delta: Delta
    lost_energy: Mapping[str, float]


def compress(delta: Delta, rank: int | None = None, energy: float | None = None) -> Compressed:
    """Reduce the ranks of a delta to the nearest change of lower rank, parameter by parameter.

    B A = Q_b R_b (Q_a R_a)^T = Q_b (U S V^T) Q_a^T: the SVD of an r x r core, truncated
    (Eckart-Young), with sqrt(S) in each factor. Computed in fp64, stored in the delta's dtype. A
    dense change becomes low-rank. Rows of several edits are mixed, so single edits cannot be
    removed afterwards.

    Args:
        delta: A delta of kinds `dense` and `lowrank`.
        rank: Rank to keep.
        energy: Fraction of sum(S^2) to keep, instead of `rank`, from 0 (excluded) to 1.

    Returns:
        The compressed delta and the lost energy, which is also written to the header's settings.

    Raises:
        InvalidInputError: If not exactly one of rank >= 1 and 0 < energy <= 1 is given.
        UnsupportedKindError: If the delta is stacked, or an entry is not a change of a matrix.
    """
    by_rank = isinstance(rank, int) and rank >= 1 and energy is None
    by_energy = energy is not None and 0 < energy <= 1 and rank is None
    if not (by_rank or by_energy):
        raise InvalidInputError(
            f"compress needs a rank >= 1 or an energy in (0, 1], got rank={rank}, energy={energy}."
        )
    if delta.header.stack:
        raise UnsupportedKindError("a stacked delta holds edits side by side: unstack it first.")
    compressed = []
    lost_energy = {}
    for part in entries_of(delta).values():
        u, s, v = _svd(part)  # [O k] [k] [I k]
        power = s.square().cumsum(0)
        total = power[-1]
        if energy is not None:
            count = int(torch.searchsorted(power, energy * total * (1 - 1e-12))) + 1
        else:
            count = min(rank or 1, len(s))
        count = max(1, min(count, len(s)))
        root = s[:count].sqrt()
        dtype = next(iter(part.tensors.values())).dtype
        tensors = {".A": (v[:, :count] * root).T.to(dtype), ".B": (u[:, :count] * root).to(dtype)}
        entry = LowRank(
            name=part.entry.name,
            checkpoint_name=part.entry.checkpoint_name,
            shape=part.entry.shape,
            rank=count,
            edit_ranks=(count,) if part.num_edits == 1 else (),
            transposed=getattr(part.entry, "transposed", False),
        )
        lost_share = 1 - float(power[count - 1] / total) if float(total) else 0.0
        lost_energy[part.entry.name] = min(1.0, max(0.0, lost_share))
        compressed.append(EntryTensors(entry, tensors, part.num_edits))
    note = {"rank": rank, "energy": energy, "lost_energy": lost_energy}
    has_dense = any(not isinstance(entry, LowRank) for entry in delta.header.entries)
    header = msgspec.structs.replace(
        delta.header,
        settings={**delta.header.settings, "compressed": note},
        arithmetic="weight"
        if has_dense
        else delta.header.arithmetic,  # a dense change is added to the weight
    )
    return Compressed(_assemble_delta(header, compressed), lost_energy)


def _svd(part: EntryTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U [O k], S [k], V [I k] of the change in fp64."""
    if isinstance(part.entry, LowRank):
        left, right = torch.linalg.qr(part.tensors[".B"].double())
        inner, outer = torch.linalg.qr(part.tensors[".A"].double().T)
        u, s, vh = torch.linalg.svd(right @ outer.T, full_matrices=False)
        return left @ u, s, inner @ vh.T
    if "" not in part.tensors or part.tensors[""].ndim != 2:
        raise UnsupportedKindError(
            f"{part.entry.name}: only a change of a matrix can be written as a low-rank one."
        )
    u, s, vh = torch.linalg.svd(part.tensors[""].double(), full_matrices=False)
    return u, s, vh.T


def _edit_numbers(header: Header, edits: Iterable[int | str]) -> list[int]:
    """Return the positions of edits given by number or id, in order, each once."""
    numbers: set[int] = set()
    missing = []
    for edit in edits:
        if isinstance(edit, int):
            hits = [edit] if 0 <= edit < len(header.edits) else []
        else:
            hits = [k for k, record in enumerate(header.edits) if record.id == edit]
        numbers.update(hits)
        if not hits:
            missing.append(repr(edit))
    if missing:
        first_ids = ", ".join(record.id for record in header.edits[:6])
        raise InvalidInputError(
            f"each edit must be one of the delta's {len(header.edits)}, by number or id, and "
            f"{', '.join(missing[:6])} is none; it has {first_ids or 'none'}"
            + (", ..." if len(header.edits) > 6 else ".")
        )
    return sorted(numbers)


def _require_mergeable(deltas: Sequence[Delta]) -> None:
    require_same_base(deltas)
    problems = []
    if any(delta.header.stack for delta in deltas):
        problems.append("a stacked delta holds edits side by side, and must be taken apart first")
    shapes: dict[str, set[Any]] = {}
    dtypes: dict[str, set[Any]] = {}
    for delta in deltas:
        for entry in delta.header.entries:
            fixed = ("shape", "checkpoint_name", "transposed")
            fixed_values = tuple(getattr(entry, field, None) for field in fixed)
            shapes.setdefault(f"{entry.name} ({type(entry).__name__})", set()).add(fixed_values)
            for name in entry.tensor_specs():
                if delta.tensors[name].is_floating_point():
                    dtypes.setdefault(entry.name, set()).add(delta.tensors[name].dtype)
    problems += [
        f"{name}: shapes or names differ" for name, values in shapes.items() if len(values) > 1
    ]
    problems += [
        f"{name}: dtypes differ ({', '.join(sorted(map(str, some)))}), cast one to the other's"
        for name, some in dtypes.items()
        if len(some) > 1
    ]
    arithmetics = {d.header.arithmetic for d in deltas if _has_lowrank(d)}
    if len(arithmetics) > 1:
        problems.append(
            f"arithmetics differ ({', '.join(sorted(arithmetics))}): no one delta computes the same"
        )
    if problems:
        raise InvalidInputError(f"these deltas cannot be merged: {join_messages(problems)}.")


def _refuse_contradictions(deltas: Sequence[Delta]) -> None:
    """Refuse two deltas that teach one question different answers: one would win in silence."""
    known: dict[tuple[str, tuple[str, ...]], tuple[int, EditRecord]] = {}
    contradictions = []
    for number, delta in enumerate(deltas):
        for edit in delta.header.edits:
            if not (edit.prompt and edit.target):
                continue
            earlier, other = known.setdefault((edit.prompt, edit.images), (number, edit))
            if earlier != number and other.target != edit.target:
                contradictions.append(
                    f"edit {other.id} of delta {earlier + 1} and edit {edit.id} of delta "
                    f"{number + 1}"
                )
    if contradictions:
        raise InvalidInputError(
            f"these teach one question different answers: {join_messages(contradictions)}. Remove "
            "one of each, or merge with allow_conflicts=True (`errata merge --allow-conflicts`)."
        )


def require_same_base(deltas: Sequence[Delta]) -> None:
    """Check that all deltas were made for one base.

    Args:
        deltas: At least one delta.

    Raises:
        BaseMismatchError: If family, config or a shared parameter differs. Lists every difference.
    """
    first: BaseModel = deltas[0].header.base
    differences = []
    for delta in deltas[1:]:
        base = delta.header.base
        for what in ("family", "config_hash"):
            first_value, other_value = getattr(first, what), getattr(base, what)
            if first_value and other_value and first_value != other_value:
                differences.append(f"{what} {first_value[:16]} is not {other_value[:16]}")
        both = first.parameter_hashes.keys() & base.parameter_hashes.keys()
        differences += [
            f"{n} has other values"
            for n in both
            if first.parameter_hashes[n] != base.parameter_hashes[n]
        ]
    if differences:
        ids = ", ".join(sorted({delta.header.base.id for delta in deltas}))
        raise BaseMismatchError(
            f"the deltas must be made for one base model ({ids}): {join_messages(differences)}."
        )


def _has_lowrank(delta: Delta) -> bool:
    return any(isinstance(entry, LowRank) for entry in delta.header.entries)


def _arithmetic_of(deltas: Sequence[Delta]) -> Any:
    arithmetics = [delta.header.arithmetic for delta in deltas if _has_lowrank(delta)]
    return arithmetics[0] if arithmetics else deltas[0].header.arithmetic


def _assemble_delta(header: Header, entries: Iterable[EntryTensors]) -> Delta:
    """Make a delta of a header and entries with their tensors."""
    entries = list(entries)
    tensors = {p.entry.name + suffix: x for p in entries for suffix, x in p.tensors.items()}
    return Delta(msgspec.structs.replace(header, entries=tuple(p.entry for p in entries)), tensors)
