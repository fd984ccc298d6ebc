"""Qwen3-VL: as Qwen2-VL, and features of several vision layers added between decoder layers.

"Qwen3-VL Technical Report", 2025. What DeepStack (Meng et al., 2024) adds after the first layers
is recorded by the capture as `added.*` extras, so that a cut inside them is exact too.
"""

from .family import Family
from .qwen2_vl import forward_arguments, mrope_positions

__all__ = ["family"]

family = Family(
    "qwen3_vl",
    forward_arguments=forward_arguments,
    position_ids=mrope_positions,
    vision_path="model.visual",
    projector_path="model.visual.merger",
    vision_features_path="model",
    takes_videos=True,
)
