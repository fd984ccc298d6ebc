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
from .entries import (
    FLOATS,
    NAME,
    Blend,
    Codebook,
    Dense,
    Experts,
    LowRank,
    Masked,
    Prompt,
    Scope,
    Want,
    Where,
)

__all__ = [
    "FLOATS",
    "FORMAT",
    "Blend",
    "Codebook",
    "Dense",
    "EditRecord",
    "Entry",
    "Experts",
    "Form",
    "Header",
    "LowRank",
    "Masked",
    "Prompt",
    "Scope",
    "Want",
    "Where",
    "faults",
]

FORMAT = 1

_HASH = re.compile(r"([0-9a-f]{64})?", re.ASCII)
_ABSOLUTE = re.compile(r"(/|~|\\|[A-Za-z]:[\\/]|file:)", re.ASCII)

Form = Literal["act", "act_fp32", "weight"]
"""How a low-rank change is added.

act       y = x Wᵀ + (x Aᵀ) Bᵀ, in the model's dtype
act_fp32  the same, the low-rank product in fp32, cast once at the end
weight    W' = W + (B A).to(W.dtype), B A in fp32, then y = x W'ᵀ: what PEFT merges to
"""

Entry = Dense | LowRank | Codebook | Masked | Experts | Scope | Prompt


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
            name: (dtypes, shape if name in entry.common() else axis + shape)
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
        if not NAME.fullmatch(name) or not digest or not _HASH.fullmatch(digest):
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
