"""The kinds of entry a delta may have; plain data, free of torch.

A new kind is one file here, a line in `Entry` (`header.py`), one in `bind.KINDS` (what it does to a
model), and one `kinds.register` (how such entries are merged, taken apart and scaled).
"""

from .codebook import Codebook, Replacement
from .common import FLOAT_DTYPES, PARAMETER_NAME, ActsOn, Entry, TensorSpec, invalid_names
from .experts import Experts, RoutingInput
from .masked import Activation, GateStatistic, Masked
from .prompt import DemonstrationKey, DemonstrationOrder, Prompt
from .scope import Gate, NetworkSizes, Scope
from .weights import Dense, LowRank

__all__ = [
    "FLOAT_DTYPES",
    "PARAMETER_NAME",
    "Activation",
    "ActsOn",
    "RoutingInput",
    "DemonstrationKey",
    "Codebook",
    "Dense",
    "Experts",
    "Gate",
    "Entry",
    "LowRank",
    "Masked",
    "DemonstrationOrder",
    "Prompt",
    "Scope",
    "NetworkSizes",
    "GateStatistic",
    "TensorSpec",
    "Replacement",
    "invalid_names",
]
