"""Settings of the protocols. No torch."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["LifelongSettings", "Protocol", "SequentialSettings", "SingleSettings"]

Count = Annotated[int, Meta(ge=1, le=10**9)]
Natural = Annotated[int, Meta(ge=0, le=10**9)]


class SingleSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="single"
):
    """Independent edits, each on the base, side by side."""

    batch_size: Natural = 0  # edits in one batch; 0: as many as the memory budget allows


class SequentialSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sequential"
):
    """Edits one after another in one model. The base is restored between sequences."""

    sequence_length: Natural = 0  # edits per sequence; 0: all of them
    gaps: tuple[Count, ...] = ()  # also evaluate a case this many edits after its own


class LifelongSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lifelong"
):
    """Edits one after another in one model. All edits so far are evaluated along the way."""

    eval_after: Annotated[tuple[Count, ...], Meta(min_length=1)] = (1, 10, 100, 1000)
    max_evaluated: Natural = 0  # edits evaluated at a time, evenly spread; 0: all so far


Protocol = SingleSettings | SequentialSettings | LifelongSettings
