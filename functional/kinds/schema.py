"""The union of entries, for reading delta files. No torch. One line per kind."""

from __future__ import annotations

from errata.functional.kinds.codebook.entry import Codebook
from errata.functional.kinds.dense.entry import Dense
from errata.functional.kinds.experts.entry import Experts
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.kinds.masked.entry import Masked
from errata.functional.kinds.prompt.entry import Prompt
from errata.functional.kinds.scope.entry import Scope

__all__ = ["AnyEntry"]

AnyEntry = Dense | LowRank | Codebook | Masked | Experts | Scope | Prompt
