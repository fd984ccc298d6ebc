"""What a delta says of itself: base, editor, entries by kind, and the list of edits.

The kinds are a closed union: `bind` interprets kinds, never methods, so a delta file works without
the editor that wrote it. Everything here is plain data and serialises to canonical JSON.

A kind is a Struct derived from `Entry`: `name` is its parameter or site, `tensor_specs()` lists its
tensors, named `<name>` or `<name>.<part>` (without the edit axis of a stacked delta), and
`validate()` reports its violations. It is listed in `functional/kinds/schema.py` and, with its
algebra, in `functional/kinds/table.py`. `functional/deltas/FORMAT.md` describes the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from errata.functional.card import BaseModel

__all__ = [
    "FLOAT_DTYPES",
    "FORMAT",
    "PARAMETER_NAME",
    "ActsOn",
    "Arithmetic",
    "EditRecord",
    "Entry",
    "Header",
    "TensorSpec",
    "invalid_names",
    "validate_header",
]

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

TensorSpec = tuple[tuple[str, ...], tuple[int, ...]]
"""What a tensor must be: one of these dtypes (safetensors' names), and this shape."""

ActsOn = Literal["module", "embeddings", "prompt"]

PARAMETER_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}(\.[A-Za-z0-9_-]{1,128}){0,31}", re.ASCII)


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of a delta: what it changes, in plain data. `name` is its parameter or site.

    The last five methods describe the entry in a stacked delta, where edits are independent. Their
    defaults suit a kind without data per edit.
    """

    name: str  # an in-memory parameter
    checkpoint_name: str  # the same parameter in the checkpoint's naming
    shape: tuple[int, ...]  # of the parameter as stored

    def acts_on(self) -> ActsOn:
        """Where it acts first: at its site, on the embedded rows, or on the questions as read."""
        return "module"

    def is_weight_change(self) -> bool:
        """Whether it adds to a parameter: alike at every position, without routing, fusable."""
        return False

    def needs_all_tokens(self) -> bool:
        """Whether it must see all tokens of a row where it acts, not the scored ones alone."""
        return False

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Every tensor, named `<name>` or `<name>.<part>`, without the axis of a stack."""
        raise NotImplementedError

    def validate(self, header: Header) -> Iterator[str]:
        """Find everything that is wrong with the entry in itself.

        Args:
            header: Header that the entry belongs to.

        Returns:
            Complaints, one sentence each; none for a good entry.
        """
        raise NotImplementedError

    def shared_tensors(self) -> frozenset[str]:
        """Tensors that all edits of a stacked delta share: those without an edit axis there."""
        return frozenset()

    def layout(self) -> Entry:
        """What entries of a kind must agree in to be stacked: all but what is per edit."""
        return self

    @classmethod
    def stack(cls, entries: Sequence[Entry]) -> Entry:
        """Combine the same entry of several deltas into one of a stacked delta.

        Args:
            entries: The entry of each delta, in the order of the stack.

        Returns:
            The entry of the stacked delta.
        """
        return entries[0].layout()

    def select(self, edits: Sequence[int]) -> Entry:
        """Restrict an entry of a stacked delta to some of its edits.

        Args:
            edits: Indices of the edits to keep.

        Returns:
            The entry of a stacked delta with these edits alone.
        """
        return self

    def unstack(self, header: Header, edit: int) -> Entry:
        """Take one edit's entry out of a stacked delta.

        Args:
            header: Header of the stacked delta.
            edit: Index of the edit.

        Returns:
            The entry of a delta with this edit alone.
        """
        return self.select([edit])


def invalid_names(*names: str) -> Iterator[str]:
    """Find names that are not dotted parameter names.

    Args:
        *names: Names of parameters or modules.

    Yields:
        One complaint for each bad name.
    """
    for name in names:
        if not PARAMETER_NAME.fullmatch(name):
            yield f"{name[:80]!r} must be a dotted parameter name of letters, digits, '_' and '-'"


FORMAT = 2
"""The format of delta files that are written. Format 1 is read too: `deltas/format1.py`."""

_SHA256_HEX = re.compile(r"([0-9a-f]{64})?", re.ASCII)
_ABSOLUTE_PATH = re.compile(r"(/|~|\\|[A-Za-z]:[\\/]|file:)", re.ASCII)

Arithmetic = Literal["act", "act_fp32", "weight"]
"""How a low-rank change is added.

act       y = x Wᵀ + (x Aᵀ) Bᵀ, in the model's dtype
act_fp32  the same, the low-rank product in fp32, cast once at the end
weight    W' = W + (B A).to(W.dtype), B A in fp32, then y = x W'ᵀ: what PEFT merges to
"""


class EditRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One edit: hashes, not contents, so a delta can be shipped without its data.

    Attributes:
        id: A name. By default the first 12 digits of a hash of prompt, target and images.
        prompt: sha256 of the prompt in hex.
        target: sha256 of the target in hex.
        images: Content ids of the images.
    """

    id: str
    prompt: str = ""  # sha256 of the prompt
    target: str = ""
    images: tuple[str, ...] = ()  # content names: sha256, or what a data set calls its image


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a delta except its tensors.

    Attributes:
        format: Number of the file format.
        editor: The method.
        settings: Its settings.
        base: The base it was made for.
        arithmetic: How low-rank changes are added.
        entries: What changes.
        edits: The edits, in order.
        stack: E > 0 for a stacked delta: tensors have a leading edit axis, edits[e] is edit e.
        order_dependent: Whether later edits depend on earlier ones, so that single edits cannot be
            removed.
    """

    format: int = FORMAT
    editor: str = ""
    settings: dict[str, Any] = {}
    base: BaseModel
    arithmetic: Arithmetic = "act"
    entries: tuple[Entry, ...] = ()
    edits: tuple[EditRecord, ...] = ()
    stack: int = 0  # E > 0: tensors have a leading edit axis, edits[e] is edit e
    order_dependent: bool = (
        False  # later edits depend on earlier ones: single edits cannot be removed
    )

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the delta: the dtypes it may have, and its shape."""
        axis = (self.stack,) if self.stack else ()
        return {
            name: (dtypes, shape if name in entry.shared_tensors() else axis + shape)
            for entry in self.entries
            for name, (dtypes, shape) in entry.tensor_specs().items()
        }


def validate_header(header: Header) -> list[str]:
    """Find everything that is wrong with a header in itself.

    >>> from errata.functional.kinds.schema import Dense
    >>> entry = Dense(name="w", checkpoint_name="w", shape=())
    >>> validate_header(Header(base=BaseModel(id="a/model"), entries=(entry,)))
    ['w: the shape must be of positive sizes, is []']

    Args:
        header: Header of a delta.

    Returns:
        Complaints, one sentence each; empty for a good header.
    """
    return list(_header_violations(header))


def _header_violations(header: Header) -> Iterator[str]:
    if header.format != FORMAT:
        yield f"the format must be {FORMAT}, is {header.format}"
    for what, text in (("editor", header.editor), ("base.id", header.base.id)):
        if not _is_short_text(text):
            yield f"{what} must be printable text of at most 256 characters"
        elif _ABSOLUTE_PATH.match(text) or ".." in text:
            yield f"{what} must be a name, not a path on someone's machine"
    base = header.base
    if not (
        _is_short_text(base.revision)
        and _is_short_text(base.family)
        and _SHA256_HEX.fullmatch(base.config_hash)
    ):
        yield "base.revision and base.family must be printable, base.config_hash a sha256 in hex"
    for name, digest in base.parameter_hashes.items():
        if not PARAMETER_NAME.fullmatch(name) or not digest or not _SHA256_HEX.fullmatch(digest):
            yield f"base.parameter_hashes[{name[:80]!r}] must give the sha256 of a parameter in hex"
    yield from _absolute_paths(header.settings, "settings")
    tensor_names: set[str] = set()
    for entry in header.entries:
        is_valid = True
        for violation in entry.validate(header):
            is_valid = False
            yield violation
        for name in entry.tensor_specs() if is_valid else ():
            if name in tensor_names:
                yield f"{name}: two entries have a tensor of this name"
            tensor_names.add(name)
    if header.stack < 0 or (header.stack and header.stack != len(header.edits)):
        yield f"stack must be 0 or the number of edits ({len(header.edits)}), is {header.stack}"
    for number, edit in enumerate(header.edits):
        if not _is_short_text(edit.id):
            yield f"edits[{number}].id must be printable text of at most 256 characters"
        if not (_SHA256_HEX.fullmatch(edit.prompt) and _SHA256_HEX.fullmatch(edit.target)):
            yield f"edits[{number}] must give sha256 hashes of prompt and target in hex"
        if not all(_is_short_text(key) and not _ABSOLUTE_PATH.match(key) for key in edit.images):
            yield f"edits[{number}].images must be content names: hashes, or names of a data set's"


def _is_short_text(text: str) -> bool:
    return len(text) <= 256 and text.isprintable()


def _absolute_paths(value: Any, where: str) -> Iterator[str]:
    """Absolute paths among the settings: they say more of a machine than of an edit."""
    if isinstance(value, str):
        if _ABSOLUTE_PATH.match(value):
            yield f"{where} must not hold a path of this machine: store a name or a hash instead"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _absolute_paths(inner, f"{where}.{str(key)[:40]}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _absolute_paths(inner, f"{where}[]")
