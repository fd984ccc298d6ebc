"""The functional core: values, cut decoding, binding, factors, losses, metrics, delta files.

Names load on first use, so that reading a delta's header (`errata inspect`) does not import torch. To
export a name: import it below, list it in `__all__`, and list its module in `_MODULES`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.functional.binding.bound_model import bind
    from errata.functional.binding.per_row import bind_rows
    from errata.functional.card import BaseModel, ModelCard
    from errata.functional.deltas.comparison import conflicts, diff
    from errata.functional.deltas.merging import compress, merge, remove, scale, select
    from errata.functional.deltas.serialization import load_delta, save_delta
    from errata.functional.forward.generation import generate
    from errata.functional.header import EditRecord, Header
    from errata.functional.kinds.codebook.entry import Codebook
    from errata.functional.kinds.dense.entry import Dense
    from errata.functional.kinds.experts.entry import Experts
    from errata.functional.kinds.lowrank.entry import LowRank
    from errata.functional.kinds.masked.entry import Masked
    from errata.functional.kinds.prompt.entry import Prompt
    from errata.functional.kinds.scope.entry import Scope
    from errata.functional.metrics.readout import read_out
    from errata.functional.queries import Case, Query
    from errata.functional.types import (
        IGNORE_INDEX,
        Batch,
        Delta,
        Editor,
        Hook,
        Hooks,
        Inputs,
        KVCache,
        Learner,
        Model,
        Params,
    )

__all__ = [
    "IGNORE_INDEX",
    "BaseModel",
    "Batch",
    "Case",
    "Codebook",
    "Delta",
    "Dense",
    "EditRecord",
    "Editor",
    "Experts",
    "Header",
    "Inputs",
    "Learner",
    "LowRank",
    "Masked",
    "Model",
    "ModelCard",
    "Params",
    "KVCache",
    "Prompt",
    "Query",
    "Hook",
    "Hooks",
    "Scope",
    "read_out",
    "bind",
    "bind_rows",
    "compress",
    "conflicts",
    "diff",
    "generate",
    "load_delta",
    "merge",
    "remove",
    "save_delta",
    "scale",
    "select",
]

# Searched in this order: those without torch first.
_MODULES = (
    "card",
    "header",
    "queries",
    "types",
    "io",
    "merge",
    "compare",
    "bind",
    "mixed",
    "answers",
    "generate",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _MODULES:
            module = import_module(f"{__name__}.{home}")
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """`functional.bind` is the function, also after its module of the same name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in __all__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
