"""LLaVA-OneVision: a SigLIP tower over tiles of an image, a projector, a Qwen2 decoder.

Li et al., "LLaVA-OneVision: Easy Visual Task Transfer", 2024;
`LlavaOnevisionForConditionalGeneration`.
"""

from .family import Family

__all__ = ["family"]

family = Family(
    "llava_onevision",
    vision="model.vision_tower",
    projector="model.multi_modal_projector",
    features="model",
    videos=True,
    known=frozenset({"use_image_newline_parameter"}),
    values={"use_image_newline_parameter": (None, True)},
)
