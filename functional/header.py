"""What a delta says of itself: base, editor, entries by kind, and the list of edits.

The kinds are a closed union: `bind` interprets kinds, never methods, so a delta file works without
the editor that wrote it. Everything here is plain data and serialises to canonical JSON.

A kind joins by its Struct: `name` is the parameter or site it is about, `tensors()` says which
tensors it has, named `<name>` or `<name>.<part>` (without the edit axis of a stacked delta), and
`faults()` what is wrong with it; then it stands in `Entry`. Files, `show` and `check` need no more
than that; `kinds.register` gives it an algebra. `FORMAT.md` describes the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from .card import Base

__all__ = [
    "FLOATS",
    "FORMAT",
    "Codebook",
    "Dense",
    "EditRecord",
    "Entry",
    "Form",
    "Header",
    "LowRank",
    "Want",
    "Where",
    "faults",
]

FORMAT = 1

FLOATS = ("F64", "F32", "F16", "BF16")

Want = tuple[tuple[str, ...], tuple[int, ...]]
"""What a tensor must be: one of these dtypes (safetensors' names), and this shape."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}(\.[A-Za-z0-9_-]{1,128}){0,31}", re.ASCII)
_HASH = re.compile(r"([0-9a-f]{64})?", re.ASCII)
_ABSOLUTE = re.compile(r"(/|~|\\|[A-Za-z]:[\\/]|file:)", re.ASCII)

Form = Literal["act", "act_fp32", "weight"]
"""How a low-rank change is added.

act       y = x Wᵀ + (x Aᵀ) Bᵀ, in the model's dtype
act_fp32  the same, the low-rank product in fp32, cast once at the end
weight    W' = W + (B A).to(W.dtype), B A in fp32, then y = x W'ᵀ: what PEFT merges to
"""

Where = Literal["last", "prompt", "all"]
"""Which tokens a codebook's value replaces, with t the prompt's last: t, those before t, or both.

Tokens of the answer are never replaced: what is generated token by token is what one pass gives.
"""


class Dense(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dense"):
    """Change of a whole parameter: W' = W + d. Tensor `<name>`: the shape of the parameter."""

    name: str  # in-memory parameter name
    checkpoint: str  # the same parameter in the checkpoint's naming
    shape: tuple[int, ...]

    def tensors(self) -> dict[str, Want]:
        return {self.name: (FLOATS, self.shape)}

    def faults(self, header: Header) -> Iterator[str]:
        yield from _misnamed(self.name, self.checkpoint)
        if not self.shape or min(self.shape) < 1:
            yield f"{self.name}: the shape must be of positive sizes, is {list(self.shape)}"


class LowRank(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lowrank"):
    """Low-rank change of a linear map: dW = B A, dW [out in].

    Tensors `<name>.A` [r in] and `<name>.B` [out r]; any scale is folded into B. `rows[k]` of the r
    rows belong to edit k, in order (sum == r); empty where the rank is shared by all edits.
    `transposed`: the parameter is stored [in out].
    """

    name: str
    checkpoint: str
    shape: tuple[int, ...]  # of the parameter as stored
    rank: int
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def tensors(self) -> dict[str, Want]:
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return {
            f"{self.name}.A": (FLOATS, (self.rank, inner)),
            f"{self.name}.B": (FLOATS, (out, self.rank)),
        }

    def faults(self, header: Header) -> Iterator[str]:
        yield from _misnamed(self.name, self.checkpoint)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
        if self.rank < 1:
            yield f"{self.name}: the rank must be at least 1, is {self.rank}"
        if not self.rows:
            return
        if header.stack:
            yield f"{self.name}: rows must be empty in a stacked delta"
        elif len(self.rows) != len(header.edits):
            yield (
                f"{self.name}: rows must name a number of rows for each of the "
                f"{len(header.edits)} edits, names {len(self.rows)}"
            )
        elif min(self.rows) < 0 or sum(self.rows) != self.rank:
            yield f"{self.name}: rows must be counts that add up to the rank {self.rank}"


class Codebook(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="codebook"
):
    """Values that take the place of a linear map's output where its input comes near a key.

    Tensors `<name>.keys` [N in], `<name>.values` [N out], `<name>.radii` [N]. With q the map's
    input at the row's last prompt token and n the nearest key, the output there is values[n] if
    |keys[n] - q| <= radii[n]. `owners[k]` is the key of edit k, -1 where a later edit took it over.
    """

    name: str  # the map's weight
    checkpoint: str
    shape: tuple[int, ...]  # of the weight as stored
    num_keys: int
    owners: tuple[int, ...] = ()
    where: Where = "last"
    transposed: bool = False

    def tensors(self) -> dict[str, Want]:
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return {
            f"{self.name}.keys": (FLOATS, (self.num_keys, inner)),
            f"{self.name}.values": (FLOATS, (self.num_keys, out)),
            f"{self.name}.radii": (FLOATS, (self.num_keys,)),
        }

    def faults(self, header: Header) -> Iterator[str]:
        yield from _misnamed(self.name, self.checkpoint)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
        if self.num_keys < 1:
            yield f"{self.name}: there must be at least 1 key, are {self.num_keys}"
        if len(self.owners) != len(header.edits):
            yield (
                f"{self.name}: owners must name a key for each of the {len(header.edits)} edits, "
                f"names {len(self.owners)}"
            )
        elif any(not -1 <= key < self.num_keys for key in self.owners):
            yield f"{self.name}: owners must be keys from 0 to {self.num_keys - 1}, or -1"


Entry = Dense | LowRank | Codebook


class EditRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One edit: hashes, not contents, so that a delta can be shipped without the data behind it."""

    id: str
    prompt: str = ""  # sha256 of the prompt
    target: str = ""
    images: tuple[str, ...] = ()  # content names: sha256, or what a data set calls its picture


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a delta but its tensors."""

    format: int = FORMAT
    editor: str = ""
    settings: dict[str, Any] = {}
    base: Base
    form: Form = "act"
    entries: tuple[Entry, ...] = ()
    edits: tuple[EditRecord, ...] = ()
    stack: int = 0  # E > 0: tensors have a leading edit axis, edits[e] is edit e
    recursive: bool = False  # later edits depend on earlier ones: single edits can not be removed

    def tensors(self) -> dict[str, Want]:
        """Every tensor of the delta: the dtypes it may have, and its shape."""
        axis = (self.stack,) if self.stack else ()
        return {
            name: (dtypes, axis + shape)
            for entry in self.entries
            for name, (dtypes, shape) in entry.tensors().items()
        }


def faults(header: Header) -> list[str]:
    """Everything that is wrong with a header in itself; empty for a good one.

    >>> entry = Dense(name="w", checkpoint="w", shape=())
    >>> faults(Header(base=Base(id="a/model"), entries=(entry,)))
    ['w: the shape must be of positive sizes, is []']
    """
    return list(_faults(header))


def _faults(header: Header) -> Iterator[str]:
    if header.format != FORMAT:
        yield f"the format must be {FORMAT}, is {header.format}"
    for what, text in (("editor", header.editor), ("base.id", header.base.id)):
        if not _tame(text):
            yield f"{what} must be printable text of at most 256 characters"
        elif _ABSOLUTE.match(text) or ".." in text:
            yield f"{what} must be a name, not a path on someone's machine"
    base = header.base
    if not (_tame(base.revision) and _tame(base.family) and _HASH.fullmatch(base.config)):
        yield "base.revision and base.family must be printable, base.config a sha256 in hex"
    for name, digest in base.touched.items():
        if not _NAME.fullmatch(name) or not digest or not _HASH.fullmatch(digest):
            yield f"base.touched[{name[:80]!r}] must give the sha256 of a parameter in hex"
    yield from _paths(header.settings, "settings")
    seen: set[str] = set()
    for entry in header.entries:
        fine = True
        for fault in entry.faults(header):
            fine = False
            yield fault
        for name in entry.tensors() if fine else ():
            if name in seen:
                yield f"{name}: two entries have a tensor of this name"
            seen.add(name)
    if header.stack < 0 or (header.stack and header.stack != len(header.edits)):
        yield f"stack must be 0 or the number of edits ({len(header.edits)}), is {header.stack}"
    for number, edit in enumerate(header.edits):
        if not _tame(edit.id):
            yield f"edits[{number}].id must be printable text of at most 256 characters"
        if not (_HASH.fullmatch(edit.prompt) and _HASH.fullmatch(edit.target)):
            yield f"edits[{number}] must give sha256 hashes of prompt and target in hex"
        if not all(_tame(key) and not _ABSOLUTE.match(key) for key in edit.images):
            yield f"edits[{number}].images must be content names: hashes, or names of a data set's"


def _tame(text: str) -> bool:
    return len(text) <= 256 and text.isprintable()


def _misnamed(*names: str) -> Iterator[str]:
    for name in names:
        if not _NAME.fullmatch(name):
            yield f"{name[:80]!r} must be a dotted parameter name of letters, digits, '_' and '-'"


def _paths(value: Any, where: str) -> Iterator[str]:
    """Absolute paths among the settings: they say more of a machine than of an edit."""
    if isinstance(value, str):
        if _ABSOLUTE.match(value):
            yield f"{where} must not hold a path of this machine: store a name or a hash instead"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(inner, f"{where}.{str(key)[:40]}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _paths(inner, f"{where}[]")
