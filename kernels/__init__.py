"""Compiled ops: key lookup, expert routing and application, and a low-rank delta per row.

Each op has a folder. `ref.py` defines it in plain torch and runs on a CPU. `triton.py` is the
same op on a GPU. `__init__.py` checks the arguments. This package needs neither a GPU nor Triton
to be imported.
"""

from errata.kernels.codebook import (
    KeyLookup,
    Nearest,
    lookup_key,
    nearest_key,
    replace_hits,
    square_norms,
)
from errata.kernels.grouped_lora import apply_grouped_lora
from errata.kernels.lora_moe import Routes, apply_experts, route_experts
from errata.kernels.lora_moe.ref import expert_weights

__all__ = [
    "KeyLookup",
    "Nearest",
    "Routes",
    "apply_experts",
    "apply_grouped_lora",
    "expert_weights",
    "lookup_key",
    "nearest_key",
    "replace_hits",
    "route_experts",
    "square_norms",
]
