"""`KINDS`: entry class -> how it is applied to a model, and its algebra. One line per kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from errata.functional.header import Entry
from errata.functional.kinds.codebook.algebra import CODEBOOK_ALGEBRA
from errata.functional.kinds.codebook.apply import apply_codebook
from errata.functional.kinds.codebook.entry import Codebook
from errata.functional.kinds.common.algebra import Algebra
from errata.functional.kinds.common.patch import ApplyEntry
from errata.functional.kinds.dense.algebra import DENSE_ALGEBRA
from errata.functional.kinds.dense.apply import apply_dense
from errata.functional.kinds.dense.entry import Dense
from errata.functional.kinds.experts.algebra import EXPERTS_ALGEBRA
from errata.functional.kinds.experts.apply import apply_experts
from errata.functional.kinds.experts.entry import Experts
from errata.functional.kinds.lowrank.algebra import LOWRANK_ALGEBRA
from errata.functional.kinds.lowrank.apply import apply_lowrank
from errata.functional.kinds.lowrank.entry import LowRank
from errata.functional.kinds.masked.algebra import MASKED_ALGEBRA
from errata.functional.kinds.masked.apply import apply_masked
from errata.functional.kinds.masked.entry import Masked
from errata.functional.kinds.prompt.algebra import PROMPT_ALGEBRA
from errata.functional.kinds.prompt.apply import apply_prompt
from errata.functional.kinds.prompt.entry import Prompt
from errata.functional.kinds.scope.algebra import SCOPE_ALGEBRA
from errata.functional.kinds.scope.apply import apply_scope
from errata.functional.kinds.scope.entry import Scope

__all__ = ["KINDS", "Kind"]


class Kind(NamedTuple):
    """What `bind` and the algebra of deltas do with the entries of one class."""

    apply: ApplyEntry
    algebra: Algebra


KINDS: Mapping[type[Entry], Kind] = {
    Codebook: Kind(apply_codebook, CODEBOOK_ALGEBRA),
    Dense: Kind(apply_dense, DENSE_ALGEBRA),
    Experts: Kind(apply_experts, EXPERTS_ALGEBRA),
    LowRank: Kind(apply_lowrank, LOWRANK_ALGEBRA),
    Masked: Kind(apply_masked, MASKED_ALGEBRA),
    Prompt: Kind(apply_prompt, PROMPT_ALGEBRA),
    Scope: Kind(apply_scope, SCOPE_ALGEBRA),
}
