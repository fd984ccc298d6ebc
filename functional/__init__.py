"""The functional core: values, cut decoding, binding, factors, losses, metrics, delta files."""

from .card import Base, ModelCard
from .header import Dense, EditRecord, Header, LowRank
from .types import (
    IGNORE,
    Batch,
    Case,
    Delta,
    Editor,
    Inputs,
    Learner,
    Model,
    Params,
    Past,
    Query,
    Rewrite,
    Rewrites,
)

__all__ = [
    "IGNORE",
    "Base",
    "Batch",
    "Case",
    "Delta",
    "Dense",
    "EditRecord",
    "Editor",
    "Header",
    "Inputs",
    "Learner",
    "LowRank",
    "Model",
    "ModelCard",
    "Params",
    "Past",
    "Query",
    "Rewrite",
    "Rewrites",
]
