"""The functional core: values, decoding from any layer, binding, gradients, metrics, delta files.

Names are imported on first use, so that reading the header of a delta does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.functional.binding.bound_model import bind
    from errata.functional.binding.per_row import bind_rows
    from errata.functional.card import BaseModel, ModelCard
    from errata.functional.deltas.comparison import conflicts, diff
    from errata.functional.deltas.merging import compress, merge, remove, scale, select
    from errata.functional.deltas.serialization import load_delta, save_delta
    from errata.functional.forward.generation import Sampling, generate, stream
    from errata.functional.header import EditRecord, Header
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
        Model,
        Params,
    )

__all__ = [
    "IGNORE_INDEX",
    "BaseModel",
    "Batch",
    "Case",
    "Delta",
    "EditRecord",
    "Editor",
    "Header",
    "Hook",
    "Hooks",
    "Inputs",
    "KVCache",
    "Model",
    "ModelCard",
    "Params",
    "Query",
    "Sampling",
    "bind",
    "bind_rows",
    "compress",
    "conflicts",
    "diff",
    "generate",
    "load_delta",
    "merge",
    "read_out",
    "remove",
    "save_delta",
    "scale",
    "select",
    "stream",
]

_MODULES = {
    "bind": "binding.bound_model",
    "bind_rows": "binding.per_row",
    "BaseModel": "card",
    "ModelCard": "card",
    "conflicts": "deltas.comparison",
    "diff": "deltas.comparison",
    "compress": "deltas.merging",
    "merge": "deltas.merging",
    "remove": "deltas.merging",
    "scale": "deltas.merging",
    "select": "deltas.merging",
    "load_delta": "deltas.serialization",
    "save_delta": "deltas.serialization",
    "Sampling": "forward.generation",
    "generate": "forward.generation",
    "stream": "forward.generation",
    "EditRecord": "header",
    "Header": "header",
    "read_out": "metrics.readout",
    "Case": "queries",
    "Query": "queries",
    "IGNORE_INDEX": "types",
    "Batch": "types",
    "Delta": "types",
    "Editor": "types",
    "Inputs": "types",
    "KVCache": "types",
    "Model": "types",
    "Params": "types",
    "Hook": "types",
    "Hooks": "types",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
