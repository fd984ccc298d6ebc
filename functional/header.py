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
from typing import Any, Literal, Self, cast

import msgspec

from errata.functional.card import BaseModel, ModelCard

__all__ = [
    "FLOAT_DTYPES",
    "FORMAT",
    "PARAMETER_NAME",
    "ActsOn",
    "Arithmetic",
    "EditRecord",
    "Entry",
    "Header",
    "SlotEntry",
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

    def changed_names(self, card: ModelCard, header: Header) -> list[str]:
        """Every name under which the parameter or site is changed. A tied parameter has several.

        Args:
            card: Card of the model.
            header: Header of the delta.

        Returns:
            Paths of parameters or modules.
        """
        return card.all_names(self.name)

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


class SlotEntry(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry whose tensors have one slot (key, memory, expert, fact) per edit.

    Attributes:
        edit_slots: The slot of each edit, -1 where a later edit replaced it.
        shared_slots: In a stacked delta, the slot of each of the header's `shared_edits`.
    """

    edit_slots: tuple[int, ...] = ()
    shared_slots: tuple[int, ...] = ()

    def slot_violations(self, header: Header, num_slots: int, what: str) -> Iterator[str]:
        """Find what is wrong with the slots.

        Args:
            header: Header that the entry belongs to.
            num_slots: Slots of the entry.
            what: What a slot is called.

        Yields:
            Complaints, one sentence each.
        """
        for field, slots, edits in (
            ("edit_slots", self.edit_slots, header.edits),
            ("shared_slots", self.shared_slots, header.shared_edits),
        ):
            if len(slots) != len(edits):
                yield (
                    f"{self.name}: {field} must name a {what} for each of {len(edits)} edits, "
                    f"names {len(slots)}"
                )
            elif any(not -1 <= slot < num_slots for slot in slots):
                named = f"{what[:-1]}ies" if what.endswith("y") and what != "key" else f"{what}s"
                yield f"{self.name}: {field} must be {named} from 0 to {num_slots - 1}, or -1"

    def layout(self) -> Self:
        return msgspec.structs.replace(self, edit_slots=(), shared_slots=())

    @classmethod
    def stack(cls, entries: Sequence[Entry]) -> Entry:
        own = [cast(SlotEntry, entry) for entry in entries]
        edit_slots = tuple((entry.edit_slots or (-1,))[-1] for entry in own)
        return msgspec.structs.replace(own[0], edit_slots=edit_slots, shared_slots=())

    def select(self, edits: Sequence[int]) -> Self:
        return msgspec.structs.replace(self, edit_slots=tuple(self.edit_slots[k] for k in edits))

    def unstack(self, header: Header, edit: int) -> Entry:
        replaced = header.replaced_edits[edit] if header.replaced_edits else ()
        earlier = tuple(-1 if n in replaced else s for n, s in enumerate(self.shared_slots))
        selected = self.select([edit])
        return msgspec.structs.replace(
            selected, edit_slots=earlier + selected.edit_slots, shared_slots=()
        )


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
        shared_edits: In a stacked delta, earlier edits that each of its edits was made on top of.
        replaced_edits: Which of these each edit replaces. Empty: none.
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
    shared_edits: tuple[EditRecord, ...] = ()
    replaced_edits: tuple[tuple[int, ...], ...] = ()

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
    base = header.base
    names = {"base.id": base.id, "base.revision": base.revision, "base.family": base.family}
    for what, text in {"editor": header.editor, **names}.items():
        if not _is_short_text(text):
            yield f"{what} must be printable text of at most 256 characters"
        elif _ABSOLUTE_PATH.match(text) or ".." in text:
            yield f"{what} must be a name, not a path on someone's machine"
    if not _SHA256_HEX.fullmatch(base.config_hash):
        yield "base.config_hash must be a sha256 in hex"
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
    if header.shared_edits and not header.stack:
        yield "shared_edits must be empty unless the delta is stacked"
    if len(header.replaced_edits) not in (0, header.stack):
        yield f"replaced_edits must have a list for each of the {header.stack} edits, or be empty"
    count = len(header.shared_edits)
    if any(not 0 <= number < count for numbers in header.replaced_edits for number in numbers):
        yield f"replaced_edits must name shared edits from 0 to {count - 1}"
    yield from _record_violations("edits", header.edits)
    yield from _record_violations("shared_edits", header.shared_edits)


def _record_violations(field: str, records: Sequence[EditRecord]) -> Iterator[str]:
    for number, edit in enumerate(records):
        where = f"{field}[{number}]"
        if not _is_short_text(edit.id) or _ABSOLUTE_PATH.match(edit.id):
            yield f"{where}.id must be printable text of at most 256 characters, and no path"
        if not (_SHA256_HEX.fullmatch(edit.prompt) and _SHA256_HEX.fullmatch(edit.target)):
            yield f"{where} must give sha256 hashes of prompt and target in hex"
        if not all(_is_short_text(key) and not _ABSOLUTE_PATH.match(key) for key in edit.images):
            yield f"{where}.images must be content names: hashes, or names of a data set's"


def _is_short_text(text: str) -> bool:
    return len(text) <= 256 and text.isprintable()


def _absolute_paths(value: Any, where: str) -> Iterator[str]:
    """Absolute paths among the settings: they say more of a machine than of an edit."""
    if isinstance(value, str):
        if _ABSOLUTE_PATH.match(value):
            yield f"{where} must not hold a path of this machine: store a name or a hash instead"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if _ABSOLUTE_PATH.match(str(key)):
                yield f"{where} must not have a key that is a path of this machine"
            yield from _absolute_paths(inner, f"{where}.{ascii(str(key)[:40])[1:-1]}"[:200])
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _absolute_paths(inner, f"{where}[]")
