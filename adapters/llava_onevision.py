"""LLaVA-OneVision: a SigLIP tower over tiles of an image, a projector, a Qwen2 decoder.

Li et al., "LLaVA-OneVision: Easy Visual Task Transfer", 2024;
`LlavaOnevisionForConditionalGeneration`.
"""

from .family import Family

__all__ = ["family"]

family = Family(
    "llava_onevision",
    vision_path="model.vision_tower",
    projector_path="model.multi_modal_projector",
    vision_features_path="model",
    takes_videos=True,
    known_attributes=frozenset({"use_image_newline_parameter"}),
    required_values={"use_image_newline_parameter": (None, True)},
)
