"""The errors a user can meet. Each says what must hold, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BaseMismatchError",
    "DeltaFileError",
    "EditDivergedError",
    "ErrataError",
    "InvalidInputError",
    "InvalidSettingsError",
    "ShapeError",
    "UnknownSiteError",
    "UnsupportedKindError",
    "UnsupportedModelError",
    "join_messages",
    "lone_surrogate",
    "unknown_name",
]


MAX_MESSAGE_CHARS = 2000


class ErrataError(Exception):
    """Anything errata refuses to do; the message is one sentence a user can act on.

    Args:
        message: The sentence. What is over 2,000 characters is cut.
    """

    def __init__(self, message: str = "") -> None:
        is_long = len(message) > MAX_MESSAGE_CHARS
        super().__init__(f"{message[: MAX_MESSAGE_CHARS - 4]} ..." if is_long else message)


class InvalidInputError(ErrataError):
    """A request or file lacks what it must hold: empty target, unreadable image, long prompt."""


class InvalidSettingsError(ErrataError):
    """Settings that cannot be right; every violation is listed at once."""


class BaseMismatchError(ErrataError):
    """A delta made for another base model."""


class EditDivergedError(ErrataError):
    """Edits whose loss or change is not a finite number.

    Args:
        editor: Name of the method.
        edits: Indices of the edits among the queries.
        num_queries: Number of the queries.

    Attributes:
        edits: Their indices among the queries.
    """

    def __init__(self, editor: str, edits: Iterable[int], num_queries: int) -> None:
        self.edits = tuple(edits)
        numbers = join_names(str(number + 1) for number in self.edits)
        super().__init__(
            f"{editor} diverged on query {numbers} of {num_queries}: its loss or its change is NaN "
            "or infinite. Lower the learning rate, or edit in float32 or bfloat16."
        )


class DeltaFileError(ErrataError):
    """A delta file that is broken, forged, or of a format this version does not read."""


class UnsupportedKindError(ErrataError):
    """An operation that this kind of delta cannot express."""


class UnsupportedModelError(ErrataError):
    """A model that cannot be turned into functional form, with the reason."""


class ShapeError(ErrataError):
    """Tensors whose shapes do not fit the parameter they change."""


class UnknownSiteError(ErrataError):
    """A module or parameter that the model does not have."""


def join_messages(violations: Iterable[str]) -> str:
    """Join violations into one message, the first few spelled out, the rest counted.

    >>> join_messages(["a must be > 0, got -1", "b is unknown"])
    'a must be > 0, got -1; b is unknown'

    Args:
        violations: Complaints, one short sentence each.

    Returns:
        One line.
    """
    items = list(violations)
    shown = "; ".join(items[:12])
    return shown if len(items) <= 12 else f"{shown}; and {len(items) - 12} more"


def unknown_name(what: str, name: str, known: Iterable[str], renamed: str = "") -> str:
    """Say that a name is unknown, and which one may be meant.

    Args:
        what: What the name is of, e.g. "setting of lora".
        name: The unknown name.
        known: The names that exist.
        renamed: What the name is called now, if it is an old one.

    Returns:
        One clause without a full stop.

    Example:
        >>> unknown_name("setting", "cuont", ["count", "seed"])
        "unknown setting 'cuont'; did you mean 'count'?"
        >>> unknown_name("setting", "together", ["batch_size"], "batch_size")
        "unknown setting 'together'; it is now called 'batch_size'"
        >>> unknown_name("editor", "x", ["lora", "wise"])
        "unknown editor 'x'; known: lora, wise"
    """
    if renamed:
        return f"unknown {what} {name!r}; it is now called {renamed!r}"
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown {what} {name!r}; did you mean {near[0]!r}?"
    return f"unknown {what} {name!r}; known: {join_names(known)}"


def join_names(names: Iterable[str]) -> str:
    """List names, the first twenty spelled out.

    Args:
        names: Names to list.

    Returns:
        The names joined by commas; `none` for no names.
    """
    listed = list(names)
    rest = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(listed[:20]) or "none") + rest


def lone_surrogate(text: str) -> str:
    """Find half of a surrogate pair, which no tokenizer takes and no file holds.

    Args:
        text: Any text.

    Returns:
        A complaint, or the empty string.
    """
    bad = next((char for char in text if "\ud800" <= char <= "\udfff"), "")
    return f"text must be Unicode, and holds the lone surrogate U+{ord(bad):04X}" if bad else ""


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return up to three names near an unknown one, in parentheses. Empty if none is near.

    Args:
        name: The name that is not known.
        known: The names that are.

    Returns:
        ` (near NAME: ...)`, ready to append to a message, or the empty string.
    """
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (near {name}: {', '.join(near)})" if near else ""
