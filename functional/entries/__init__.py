"""The kinds of entry a delta may have; plain data, free of torch.

A new kind is one file here, a line in `Entry` (`header.py`), one in `bind.KINDS` (what it does to a
model), and one `kinds.register` (how such entries are merged, taken apart and scaled).
"""

from .codebook import Codebook, Where
from .common import FLOATS, NAME, Begins, Kind, Want, misnamed
from .experts import Blend, Experts
from .masked import Activation, Masked, Statistic
from .prompt import By, Order, Prompt
from .scope import Gate, Scope, Sizes
from .weights import Dense, LowRank

__all__ = [
    "FLOATS",
    "NAME",
    "Activation",
    "Begins",
    "Blend",
    "By",
    "Codebook",
    "Dense",
    "Experts",
    "Gate",
    "Kind",
    "LowRank",
    "Masked",
    "Order",
    "Prompt",
    "Scope",
    "Sizes",
    "Statistic",
    "Want",
    "Where",
    "misnamed",
]
