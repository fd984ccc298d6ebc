"""BLIP-2 and MiniGPT-4: a ViT, a Q-Former of a few queries, one linear map, a decoder.

Li et al., "BLIP-2", 2023; Zhu et al., "MiniGPT-4", 2023. The forward is entered below Hugging
Face's own: that one demands pixels even of a row without pictures, and finds image positions by
`image_token_index`, which older checkpoints lack. The reader says where pictures stand.

B rows · L tokens · D width · n pictures · Q queries of a picture
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from errata.functional import Inputs

from .family import Family, from_mask

__all__ = ["arguments", "enter", "family", "minigpt4"]


def arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Ids, masks and pixels."""
    del module
    given = {"input_ids": inputs.ids, "attention_mask": inputs.mask.long(), "image": inputs.image}
    return given | dict(inputs.pixels)


def enter(module: Any, kwargs: Mapping[str, Any]) -> Any:
    """Write the pictures' features over the embeddings where they stand, and run the decoder."""
    rest = dict(kwargs)
    ids, image, pixels = rest.pop("input_ids"), rest.pop("image"), rest.pop("pixel_values", None)
    hidden = module.get_input_embeddings()(ids)  # [B L D]
    if pixels is not None:
        features = module.get_image_features(pixel_values=pixels).pooler_output  # [n Q D]
        hidden = hidden.masked_scatter(image[..., None], features.to(hidden.dtype))
    return module.language_model(inputs_embeds=hidden, use_cache=False, return_dict=True, **rest)


_KNOWN = frozenset(
    {
        "activation_dropout",
        "attention_dropout",
        "classifier_dropout",
        "dropout",
        "image_text_hidden_size",
        "num_channels",
        "position_embedding_type",
        "projection_dim",
    }
)
"""What checkpoints from before transformers 5 say beside what the classes read; all constants."""


def _family(model_type: str) -> Family:
    return Family(
        model_type,
        arguments=arguments,
        enter=enter,
        positions=from_mask,
        vision="vision_model",
        projector="qformer",
        features="",
        known=_KNOWN,
        values={"qformer_config.position_embedding_type": (None, "absolute")},
    )


family: Family = _family("blip-2")
minigpt4: Family = _family("minigpt4")
