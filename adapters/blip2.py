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

from .family import Family, mask_positions

__all__ = ["forward_arguments", "enter", "family", "minigpt4"]


def forward_arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Ids, masks and pixels."""
    del module
    kwargs = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask.long(),
        "image_mask": inputs.image_mask,
    }
    return kwargs | dict(inputs.vision_inputs)


def enter(module: Any, kwargs: Mapping[str, Any]) -> Any:
    """Write the pictures' features over the embeddings where they stand, and run the decoder."""
    rest = dict(kwargs)
    input_ids, image_mask, pixels = (
        rest.pop("input_ids"),
        rest.pop("image_mask"),
        rest.pop("pixel_values", None),
    )
    hidden_states = module.get_input_embeddings()(input_ids)  # [B L D]
    if pixels is not None:
        features = module.get_image_features(pixel_values=pixels).pooler_output  # [n Q D]
        hidden_states = hidden_states.masked_scatter(
            image_mask[..., None], features.to(hidden_states.dtype)
        )
    return module.language_model(
        inputs_embeds=hidden_states, use_cache=False, return_dict=True, **rest
    )


_KNOWN_ATTRIBUTES = frozenset(
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


def _make_family(model_type: str) -> Family:
    return Family(
        model_type,
        forward_arguments=forward_arguments,
        enter=enter,
        position_ids=mask_positions,
        vision_path="vision_model",
        projector_path="qformer",
        vision_features_path="",
        known_attributes=_KNOWN_ATTRIBUTES,
        required_values={"qformer_config.position_embedding_type": (None, "absolute")},
    )


family: Family = _make_family("blip-2")
minigpt4: Family = _make_family("minigpt4")
