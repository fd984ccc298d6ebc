"""The union of entries, for reading delta files. No torch. One line per kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from errata.functional.header import Header
from errata.functional.kinds.codebook.entry import Codebook
from errata.functional.kinds.dense.entry import Dense
from errata.functional.kinds.experts.entry import Experts
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.kinds.masked.entry import Masked
from errata.functional.kinds.prompt.entry import Prompt
from errata.functional.kinds.scope.entry import Scope

__all__ = ["AnyEntry", "convert_header"]

AnyEntry = Dense | LowRank | Codebook | Masked | Experts | Scope | Prompt


class _FileHeader(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A header whose entries can be read from a file: their `type` says which class they are."""

    entries: tuple[AnyEntry, ...] = ()


def convert_header(description: Mapping[str, Any]) -> Header:
    """Convert the parsed JSON description of a delta to a header.

    Args:
        description: The description, without its digest.

    Returns:
        The header, each entry of the class that its `type` names.

    Raises:
        msgspec.ValidationError: If a field is unknown or has a value of another type.
    """
    read = msgspec.convert(dict(description), _FileHeader)
    return Header(**{name: getattr(read, name) for name in Header.__struct_fields__})
