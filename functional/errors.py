"""The errors a user can meet. Each says what must hold, what came, and what to do."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable

__all__ = [
    "BaseMismatchError",
    "DeltaFileError",
    "ErrataError",
    "InvalidInputError",
    "InvalidSettingsError",
    "ShapeError",
    "UnknownSiteError",
    "UnsupportedKindError",
    "UnsupportedModelError",
    "join_messages",
    "unknown_name",
]


class ErrataError(Exception):
    """Anything errata refuses to do; the message is one sentence a user can act on."""


class InvalidInputError(ErrataError):
    """A request or file lacks what it must hold: empty target, unreadable image, long prompt."""


class InvalidSettingsError(ErrataError):
    """Settings that can not be right; every violation is listed at once."""


class BaseMismatchError(ErrataError):
    """A delta made for another base model."""


class DeltaFileError(ErrataError):
    """A delta file that is broken, forged, or of a format this version does not read."""


class UnsupportedKindError(ErrataError):
    """An operation that this kind of delta can not express."""


class UnsupportedModelError(ErrataError):
    """A model that can not be turned into functional form, with the reason."""


class ShapeError(ErrataError):
    """Tensors whose shapes do not fit the parameter they change."""


class UnknownSiteError(ErrataError):
    """A module or parameter that the model does not have."""


def join_messages(violations: Iterable[str]) -> str:
    """Join violations into one message, the first few spelled out, the rest counted.

    >>> join_messages(["a must be > 0, got -1", "b is unknown"])
    'a must be > 0, got -1; b is unknown'
    """
    items = list(violations)
    shown = "; ".join(items[:12])
    return shown if len(items) <= 12 else f"{shown}; and {len(items) - 12} more"


def unknown_name(what: str, name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{what} must be one of {', '.join(known)}; got {name!r}.{hint}"


def suggest_name(name: str, known: typing.Iterable[str]) -> str:
    """The words for a name that is not among the known ones, with the nearest.

    >>> suggest_name("cuont", ["count", "seed"])
    "'cuont' is unknown; did you mean 'count'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"{name!r} is unknown; {hint}"
