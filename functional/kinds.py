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

from .errors import BadInput, KindUnsupported
from .header import Codebook, Dense, LowRank

__all__ = [
    "Algebra",
    "Part",
    "algebra",
    "as_dense",
    "inner",
    "kept",
    "owned",
    "parts",
    "register",
    "rows_of",
]


class Part(NamedTuple):
    """One entry of a delta, its tensors by suffix ("", ".A", ".B"), and the delta's edits."""

    entry: Any
    tensors: Mapping[str, Tensor]
    edits: int


class Algebra(NamedTuple):
    """The operations of one kind; each raises KindUnsupported with the reason where it can not."""

    join: Callable[[Sequence[Part | int]], Part]  # an int: a delta of so many edits without it
    keep: Callable[[Part, Sequence[int]], Part | None]  # these edits only; None: nothing left
    scale: Callable[[Part, float], Part]


_KINDS: dict[type, Algebra] = {}


def register(kind: type, operations: Algebra) -> None:
    """Enrol a kind of entry in the algebra."""
    _KINDS[kind] = operations


def algebra(entry: Any) -> Algebra:
    """The operations of an entry's kind. Raises KindUnsupported for a kind that has none."""
    if type(entry) not in _KINDS:
        raise KindUnsupported(
            f"deltas of kind {type(entry).__name__.lower()!r} have no algebra: "
            "apply them one after another with `bind` instead."
        )
    return _KINDS[type(entry)]


def parts(delta: Any) -> dict[tuple[str, str], Part]:
    """A delta's entries with their tensors, by (name, kind)."""
    found = {}
    for entry in delta.header.entries:
        mine = {name[len(entry.name) :]: delta.tensors[name] for name in entry.tensors()}
        found[entry.name, type(entry).__name__] = Part(entry, mine, len(delta.header.edits))
    return found


def rows_of(part: Part) -> tuple[int, ...]:
    """How many rows of a low-rank entry belong to each edit; () where nobody can tell."""
    if part.entry.rows:
        return part.entry.rows
    return (part.entry.rank,) if part.edits == 1 else ()


def as_dense(part: Part) -> Tensor:
    """The change of the whole parameter, in fp32 and in the parameter's layout."""
    if isinstance(part.entry, Dense):
        return part.tensors[""].float()
    if not isinstance(part.entry, LowRank):
        raise KindUnsupported(
            f"{part.entry.name}: a {type(part.entry).__name__.lower()} decides per input what to "
            "change, and is no change of a parameter: compare what the edited models answer."
        )
    change = part.tensors[".B"].float() @ part.tensors[".A"].float()
    return change.T if part.entry.transposed else change


def inner(left: Part, right: Part) -> Tensor:
    """<dW, dW'> of two changes of one parameter, in fp64; low rank is never multiplied out.

    trace((B A)ᵀ B' A') = sum((Bᵀ B') * (A A'ᵀ))
    """
    if isinstance(left.entry, LowRank) and isinstance(right.entry, LowRank):
        downs = left.tensors[".A"].double() @ right.tensors[".A"].double().T
        ups = left.tensors[".B"].double().T @ right.tensors[".B"].double()
        return (downs * ups).sum()
    return (as_dense(left).double() * as_dense(right).double()).sum()


def owned(given: Sequence[Part | int], count: Callable[[Any], int]) -> tuple[tuple[int, ...], int]:
    """The owners of slots that are put one behind the other, and how many slots there are.

    `count(entry)` says how many slots (keys, facts, experts, memories) an entry has; the edits of a
    delta without the entry own none: -1.
    """
    owners: list[int] = []
    before = 0
    for part in given:
        if isinstance(part, int):
            owners += [-1] * part
            continue
        owners += [slot + before if slot >= 0 else -1 for slot in part.entry.owners]
        before += count(part.entry)
    return tuple(owners), before


def kept(owners: Sequence[int], keep: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    """The slots that some edits own, ascending, and the edits' owners among these alone.

    >>> kept((2, -1, 0), (0, 1))
    ([2], (0, -1))
    """
    slots = sorted({owners[k] for k in keep} - {-1})
    place = {slot: at for at, slot in enumerate(slots)} | {-1: -1}
    return slots, tuple(place[owners[k]] for k in keep)


def _join_lowrank(given: Sequence[Part | int]) -> Part:
    """B A + B' A' = [B B'] [A; A']: exact; each edit keeps its rows."""
    found = [part for part in given if isinstance(part, Part)]
    first = found[0].entry
    counts: list[int] = []
    told = True
    for part in given:
        mine = (0,) * part if isinstance(part, int) else rows_of(part)
        told = told and (isinstance(part, int) or bool(mine))
        counts += mine
    rank = sum(part.entry.rank for part in found)
    entry = msgspec.structs.replace(first, rank=rank, rows=tuple(counts) if told else ())
    tensors = {
        ".A": torch.cat([part.tensors[".A"] for part in found], dim=0),
        ".B": torch.cat([part.tensors[".B"] for part in found], dim=1),
    }
    return Part(entry, tensors, sum(p if isinstance(p, int) else p.edits for p in given))


def _keep_lowrank(part: Part, keep: Sequence[int]) -> Part | None:
    rows = rows_of(part)
    if not rows:
        raise KindUnsupported(
            f"{part.entry.name}: an edit can be taken out only where it has rows of its own, and "
            f"all {part.entry.rank} rows are shared by {part.edits} edits: undo the whole delta."
        )
    ends = [sum(rows[: k + 1]) for k in range(len(rows))]
    index = [row for k in keep for row in range(ends[k] - rows[k], ends[k])]
    if not index:
        return None
    at = torch.tensor(index)
    entry = msgspec.structs.replace(part.entry, rank=len(index), rows=tuple(rows[k] for k in keep))
    tensors = {
        ".A": part.tensors[".A"].index_select(0, at.to(part.tensors[".A"].device)),
        ".B": part.tensors[".B"].index_select(1, at.to(part.tensors[".B"].device)),
    }
    return Part(entry, tensors, len(keep))


def _scale_lowrank(part: Part, factor: float) -> Part:
    return part._replace(tensors={".A": part.tensors[".A"], ".B": part.tensors[".B"] * factor})


def _join_dense(given: Sequence[Part | int]) -> Part:
    found = [part for part in given if isinstance(part, Part)]
    total = found[0].tensors[""]
    for part in found[1:]:
        total = total + part.tensors[""]
    edits = sum(p if isinstance(p, int) else p.edits for p in given)
    return Part(found[0].entry, {"": total}, edits)


def _keep_dense(part: Part, keep: Sequence[int]) -> Part | None:
    if list(keep) == list(range(part.edits)):
        return part
    raise KindUnsupported(
        f"{part.entry.name}: a dense change is the sum of its {part.edits} edits, and single ones "
        "can not be taken out: keep the edits as files of their own and merge the ones you want."
    )


def _scale_dense(part: Part, factor: float) -> Part:
    return part._replace(tensors={"": part.tensors[""] * factor})


def _join_codebook(given: Sequence[Part | int]) -> Part:
    """All keys in one book: the nearest of them decides, the first on ties."""
    found = [part for part in given if isinstance(part, Part)]
    first = found[0].entry
    if any(part.entry.where != first.where for part in found):
        raise BadInput(f"{first.name}: the codebooks replace at different tokens.")
    keys = found[0].tensors[".keys"]
    for part in found[1:]:
        # As near as this, and rounding or the balls' margin decides which of the two is read.
        alike = 2e-5 + 4 * torch.finfo(torch.float32).eps * keys.float().norm(dim=1)
        same = kernel.lookup(part.tensors[".keys"].float(), keys.float(), alike)
        if bool(same.hit.any()):
            raise BadInput(
                f"{first.name}: two of the codebooks have the same key, and one of its values "
                "would never be read: make those edits in one sequence, so that the later one "
                "replaces the earlier."
            )
        keys = torch.cat([keys, part.tensors[".keys"]])
    owners, num_keys = owned(given, lambda entry: entry.num_keys)
    entry = msgspec.structs.replace(first, num_keys=num_keys, owners=owners)
    tensors = {s: torch.cat([part.tensors[s] for part in found]) for s in found[0].tensors}
    return Part(entry, tensors, len(owners))


def _keep_codebook(part: Part, keep: Sequence[int]) -> Part | None:
    """Keys that a kept edit owns; radii stay as the sequence of edits left them."""
    keys, owners = kept(part.entry.owners, keep)
    if not keys:
        return None
    entry = msgspec.structs.replace(part.entry, num_keys=len(keys), owners=owners)
    index = torch.tensor(keys)
    tensors = {s: x.index_select(0, index.to(x.device)) for s, x in part.tensors.items()}
    return Part(entry, tensors, len(keep))


def _scale_codebook(part: Part, factor: float) -> Part:
    raise KindUnsupported(
        f"{part.entry.name}: a codebook's value replaces an output, and half of a replacement is "
        "none: edit again, or remove edits by id."
    )


register(Codebook, Algebra(_join_codebook, _keep_codebook, _scale_codebook))
register(LowRank, Algebra(_join_lowrank, _keep_lowrank, _scale_lowrank))
register(Dense, Algebra(_join_dense, _keep_dense, _scale_dense))

# Kinds with files of their own enrol themselves.
from . import experts_algebra as _experts_algebra  # noqa: E402, F401
from . import masked as _masked  # noqa: E402, F401
from . import prompt_algebra as _prompt_algebra  # noqa: E402, F401
from . import scope_algebra as _scope_algebra  # noqa: E402, F401
