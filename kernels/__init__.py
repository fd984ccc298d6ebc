"""The compiled ops: nearest key in a codebook, routing and application of low-rank experts,
low-rank deltas that differ per row.

Each op has a folder: `ref.py` is its definition in plain torch and what runs on a CPU, `triton.py`
its twin on a GPU, `__init__.py` its contract. Neither a GPU nor Triton is needed to import this.
"""

from errata.kernels.codebook import Found, Nearest, lookup, nearest, replace, square_norms
from errata.kernels.grouped_lora import grouped_lora
from errata.kernels.lora_moe import Routes, apply, route, weigh

__all__ = [
    "Found",
    "Nearest",
    "Routes",
    "apply",
    "grouped_lora",
    "lookup",
    "nearest",
    "replace",
    "route",
    "square_norms",
    "weigh",
]
