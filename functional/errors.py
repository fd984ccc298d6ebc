"""The errors a user can meet. Each says what must hold, what came, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BadInput",
    "BadSettings",
    "BaseMismatch",
    "DeltaFault",
    "ErrataError",
    "KindUnsupported",
    "ModelUnsupported",
    "ShapeMismatch",
    "UnknownSite",
    "listed",
]


class ErrataError(Exception):
    """Anything errata refuses to do; the message is one sentence a user can act on."""


class BadInput(ErrataError):
    """A request or file lacks what it must hold: empty target, unreadable image, long prompt."""


class BadSettings(ErrataError):
    """Settings that can not be right; every violation is listed at once."""


class BaseMismatch(ErrataError):
    """A delta made for another base model."""


class DeltaFault(ErrataError):
    """A delta file that is broken, forged, or of a format this version does not read."""


class KindUnsupported(ErrataError):
    """An operation that this kind of delta can not express."""


class ModelUnsupported(ErrataError):
    """A model that can not be turned into functional form, with the reason."""


class ShapeMismatch(ErrataError):
    """Tensors whose shapes do not fit the parameter they change."""


class UnknownSite(ErrataError):
    """A module or parameter that the model does not have."""


def listed(violations: Iterable[str]) -> str:
    """Join violations into one message, the first few spelled out, the rest counted.

    >>> listed(["a must be > 0, got -1", "b is unknown"])
    'a must be > 0, got -1; b is unknown'
    """
    items = list(violations)
    shown = "; ".join(items[:12])
    return shown if len(items) <= 12 else f"{shown}; and {len(items) - 12} more"
