"""What each kind of entry can do in the algebra of deltas: join, keep some edits, scale, measure.

`merge.py` works on whole deltas and knows no kind; a kind joins by one `register`. Shape legend:
E edits · r rank · O out · I in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from errata.kernels import codebook as kernel

from .errors import InvalidInputError, UnsupportedKindError
from .header import Codebook, Dense, LowRank

__all__ = [
    "Algebra",
    "EntryTensors",
    "algebra",
    "to_dense",
    "inner_product",
    "select_slots",
    "concat_slots",
    "entries_of",
    "register",
    "ranks_per_edit",
]


class EntryTensors(NamedTuple):
    """One entry of a delta, its tensors by suffix ("", ".A", ".B"), and the delta's edits."""

    entry: Any
    tensors: Mapping[str, Tensor]
    num_edits: int


class Algebra(NamedTuple):
    """The operations of one kind; each raises KindUnsupported with the reason where it can not."""

    merge: Callable[
        [Sequence[EntryTensors | int]], EntryTensors
    ]  # an int: a delta of so many edits without it
    select: Callable[
        [EntryTensors, Sequence[int]], EntryTensors | None
    ]  # these edits only; None: nothing left
    scale: Callable[[EntryTensors, float], EntryTensors]


_KINDS: dict[type, Algebra] = {}


def register(kind: type, operations: Algebra) -> None:
    """Enrol a kind of entry in the algebra."""
    _KINDS[kind] = operations


def algebra(entry: Any) -> Algebra:
    """The operations of an entry's kind. Raises KindUnsupported for a kind that has none."""
    if type(entry) not in _KINDS:
        raise UnsupportedKindError(
            f"deltas of kind {type(entry).__name__.lower()!r} have no algebra: "
            "apply them one after another with `bind` instead."
        )
    return _KINDS[type(entry)]


def entries_of(delta: Any) -> dict[tuple[str, str], EntryTensors]:
    """A delta's entries with their tensors, by (name, kind)."""
    entries = {}
    for entry in delta.header.entries:
        entry_tensors = {
            name[len(entry.name) :]: delta.tensors[name] for name in entry.tensor_specs()
        }
        entries[entry.name, type(entry).__name__] = EntryTensors(
            entry, entry_tensors, len(delta.header.edits)
        )
    return entries


def ranks_per_edit(part: EntryTensors) -> tuple[int, ...]:
    """How many rows of a low-rank entry belong to each edit; () where nobody can tell."""
    if part.entry.edit_ranks:
        return part.entry.edit_ranks
    return (part.entry.rank,) if part.num_edits == 1 else ()


def to_dense(part: EntryTensors) -> Tensor:
    """The change of the whole parameter, in fp32 and in the parameter's layout."""
    if isinstance(part.entry, Dense):
        return part.tensors[""].float()
    if not isinstance(part.entry, LowRank):
        raise UnsupportedKindError(
            f"{part.entry.name}: a {type(part.entry).__name__.lower()} decides per input what to "
            "change, and is no change of a parameter: compare what the edited models answer."
        )
    change = part.tensors[".B"].float() @ part.tensors[".A"].float()
    return change.T if part.entry.transposed else change


def inner_product(left: EntryTensors, right: EntryTensors) -> Tensor:
    """<dW, dW'> of two changes of one parameter, in fp64; low rank is never multiplied out.

    trace((B A)ᵀ B' A') = sum((Bᵀ B') * (A A'ᵀ))
    """
    if isinstance(left.entry, LowRank) and isinstance(right.entry, LowRank):
        downs = left.tensors[".A"].double() @ right.tensors[".A"].double().T
        ups = left.tensors[".B"].double().T @ right.tensors[".B"].double()
        return (downs * ups).sum()
    return (to_dense(left).double() * to_dense(right).double()).sum()


def concat_slots(
    parts: Sequence[EntryTensors | int], count_slots: Callable[[Any], int]
) -> tuple[tuple[int, ...], int]:
    """The owners of slots that are put one behind the other, and how many slots there are.

    `count(entry)` says how many slots (keys, facts, experts, memories) an entry has; the edits of a
    delta without the entry own none: -1.
    """
    edit_slots: list[int] = []
    offset = 0
    for part in parts:
        if isinstance(part, int):
            edit_slots += [-1] * part
            continue
        edit_slots += [slot + offset if slot >= 0 else -1 for slot in part.entry.edit_slots]
        offset += count_slots(part.entry)
    return tuple(edit_slots), offset


def select_slots(
    edit_slots: Sequence[int], edits: Sequence[int]
) -> tuple[list[int], tuple[int, ...]]:
    """The slots that some edits own, ascending, and the edits' owners among these alone.

    >>> select_slots((2, -1, 0), (0, 1))
    ([2], (0, -1))
    """
    slots = sorted({edit_slots[k] for k in edits} - {-1})
    new_index = {slot: index for index, slot in enumerate(slots)} | {-1: -1}
    return slots, tuple(new_index[edit_slots[k]] for k in edits)


def _merge_lowrank(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """B A + B' A' = [B B'] [A; A']: exact; each edit keeps its rows."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0].entry
    edit_ranks: list[int] = []
    all_known = True
    for part in parts:
        ranks = (0,) * part if isinstance(part, int) else ranks_per_edit(part)
        all_known = all_known and (isinstance(part, int) or bool(ranks))
        edit_ranks += ranks
    rank = sum(part.entry.rank for part in present)
    entry = msgspec.structs.replace(
        first, rank=rank, edit_ranks=tuple(edit_ranks) if all_known else ()
    )
    tensors = {
        ".A": torch.cat([part.tensors[".A"] for part in present], dim=0),
        ".B": torch.cat([part.tensors[".B"] for part in present], dim=1),
    }
    return EntryTensors(
        entry, tensors, sum(p if isinstance(p, int) else p.num_edits for p in parts)
    )


def _select_lowrank(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    edit_ranks = ranks_per_edit(part)
    if not edit_ranks:
        raise UnsupportedKindError(
            f"{part.entry.name}: an edit can be taken out only where it has rows of its own, and "
            f"all {part.entry.rank} rows are shared by {part.num_edits} edits: undo the whole delta."
        )
    ends = [sum(edit_ranks[: k + 1]) for k in range(len(edit_ranks))]
    index = [row for k in edits for row in range(ends[k] - edit_ranks[k], ends[k])]
    if not index:
        return None
    rank_index = torch.tensor(index)
    entry = msgspec.structs.replace(
        part.entry, rank=len(index), edit_ranks=tuple(edit_ranks[k] for k in edits)
    )
    tensors = {
        ".A": part.tensors[".A"].index_select(0, rank_index.to(part.tensors[".A"].device)),
        ".B": part.tensors[".B"].index_select(1, rank_index.to(part.tensors[".B"].device)),
    }
    return EntryTensors(entry, tensors, len(edits))


def _scale_lowrank(part: EntryTensors, factor: float) -> EntryTensors:
    return part._replace(tensors={".A": part.tensors[".A"], ".B": part.tensors[".B"] * factor})


def _merge_dense(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    present = [part for part in parts if isinstance(part, EntryTensors)]
    total = present[0].tensors[""]
    for part in present[1:]:
        total = total + part.tensors[""]
    num_edits = sum(p if isinstance(p, int) else p.num_edits for p in parts)
    return EntryTensors(present[0].entry, {"": total}, num_edits)


def _select_dense(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    if list(edits) == list(range(part.num_edits)):
        return part
    raise UnsupportedKindError(
        f"{part.entry.name}: a dense change is the sum of its {part.num_edits} edits, and single ones "
        "can not be taken out: keep the edits as files of their own and merge the ones you want."
    )


def _scale_dense(part: EntryTensors, factor: float) -> EntryTensors:
    return part._replace(tensors={"": part.tensors[""] * factor})


def _merge_codebook(parts: Sequence[EntryTensors | int]) -> EntryTensors:
    """All keys in one book: the nearest of them decides, the first on ties."""
    present = [part for part in parts if isinstance(part, EntryTensors)]
    first = present[0].entry
    if any(part.entry.replacement != first.replacement for part in present):
        raise InvalidInputError(f"{first.name}: the codebooks replace at different tokens.")
    keys = present[0].tensors[".keys"]
    for part in present[1:]:
        # As near as this, and rounding or the balls' margin decides which of the two is read.
        tolerance = 2e-5 + 4 * torch.finfo(torch.float32).eps * keys.float().norm(dim=1)
        lookup = kernel.lookup_key(part.tensors[".keys"].float(), keys.float(), tolerance)
        if bool(lookup.hit.any()):
            raise InvalidInputError(
                f"{first.name}: two of the codebooks have the same key, and one of its values "
                "would never be read: make those edits in one sequence, so that the later one "
                "replaces the earlier."
            )
        keys = torch.cat([keys, part.tensors[".keys"]])
    edit_slots, num_keys = concat_slots(parts, lambda entry: entry.num_keys)
    entry = msgspec.structs.replace(first, num_keys=num_keys, edit_slots=edit_slots)
    tensors = {s: torch.cat([part.tensors[s] for part in present]) for s in present[0].tensors}
    return EntryTensors(entry, tensors, len(edit_slots))


def _select_codebook(part: EntryTensors, edits: Sequence[int]) -> EntryTensors | None:
    """Keys that a kept edit owns; radii stay as the sequence of edits left them."""
    slots, edit_slots = select_slots(part.entry.edit_slots, edits)
    if not slots:
        return None
    entry = msgspec.structs.replace(part.entry, num_keys=len(slots), edit_slots=edit_slots)
    index = torch.tensor(slots)
    tensors = {s: x.index_select(0, index.to(x.device)) for s, x in part.tensors.items()}
    return EntryTensors(entry, tensors, len(edits))


def _scale_codebook(part: EntryTensors, factor: float) -> EntryTensors:
    raise UnsupportedKindError(
        f"{part.entry.name}: a codebook's value replaces an output, and half of a replacement is "
        "none: edit again, or remove edits by id."
    )


register(Codebook, Algebra(_merge_codebook, _select_codebook, _scale_codebook))
register(LowRank, Algebra(_merge_lowrank, _select_lowrank, _scale_lowrank))
register(Dense, Algebra(_merge_dense, _select_dense, _scale_dense))

# Kinds with files of their own enrol themselves.
from . import experts_algebra as _experts_algebra  # noqa: E402, F401
from . import masked as _masked  # noqa: E402, F401
from . import prompt_algebra as _prompt_algebra  # noqa: E402, F401
from . import scope_algebra as _scope_algebra  # noqa: E402, F401
