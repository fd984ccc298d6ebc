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
    from .answers import read_out
    from .bind import bind
    from .card import BaseModel, ModelCard
    from .compare import conflicts, diff
    from .generate import generate
    from .header import Codebook, Dense, EditRecord, Experts, Header, LowRank, Masked, Prompt, Scope
    from .io import load_delta, save_delta
    from .merge import compress, merge, remove, scale, select
    from .mixed import bind_rows
    from .types import (
        IGNORE_INDEX,
        Batch,
        Case,
        Delta,
        Editor,
        Hook,
        Hooks,
        Inputs,
        KVCache,
        Learner,
        Model,
        Params,
        Query,
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
