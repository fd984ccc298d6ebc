"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama decoder; features replace placeholders.

Liu et al., "Improved Baselines with Visual Instruction Tuning", 2024;
`LlavaForConditionalGeneration`.
"""

from .family import Family

__all__ = ["family"]

family = Family(
    "llava",
    vision_path="model.vision_tower",
    projector_path="model.multi_modal_projector",
    vision_features_path="model",
)
