"""The compiled ops: nearest key in a codebook, routing and application of low-rank experts,
low-rank deltas that differ per row.

Each op has a folder: `ref.py` is its definition in plain torch and what runs on a CPU, `triton.py`
its twin on a GPU, `__init__.py` its contract. Neither a GPU nor Triton is needed to import this.
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
