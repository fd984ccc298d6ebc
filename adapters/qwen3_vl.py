"""Qwen3-VL: as Qwen2-VL, and features of several vision layers added between decoder layers.

"Qwen3-VL Technical Report", 2025. What DeepStack (Meng et al., 2024) adds after the first layers
is recorded by the capture as `added.*` extras, so that a cut inside them is exact too.
"""

from .family import Family
from .qwen2_vl import arguments, positions

__all__ = ["family"]

family = Family(
    "qwen3_vl",
    arguments=arguments,
    positions=positions,
    vision="model.visual",
    projector="model.visual.merger",
    features="model",
    videos=True,
)
