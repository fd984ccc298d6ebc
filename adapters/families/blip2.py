"""BLIP-2 and MiniGPT-4: a ViT, a Q-Former of a few queries, one linear map, a decoder.

Li et al., "BLIP-2", 2023; Zhu et al., "MiniGPT-4", 2023. The forward is entered below Hugging
Face's own: that one demands pixels even of a row without images, and finds image positions by
`image_token_index`, which older checkpoints lack. The reader says where images stand.

B rows · L tokens · D width · n images · Q queries of an image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage
from torch import nn

from errata.adapters.families.base import Family, mask_positions
from errata.adapters.families.tiny_configs import (
    HEAD_DIM,
    MAX_POSITIONS,
    VISION_DIM,
    TinyModel,
    TinySize,
    tower_config,
)
from errata.adapters.inputs.prompt_format import PromptTemplate
from errata.adapters.inputs.vision_inputs import (
    ProcessorParts,
    VisionFormat,
    VisionInputs,
    to_tensors,
)
from errata.functional import Inputs

__all__ = ["enter", "family", "forward_arguments"]


def forward_arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Keyword arguments of `enter`: ids, masks and pixels.

    Args:
        module: The model.
        inputs: Preprocessed rows.

    Returns:
        Keyword arguments.
    """
    del module
    kwargs = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask.long(),
        "image_mask": inputs.image_mask,
    }
    return kwargs | dict(inputs.vision_inputs)


def enter(module: Any, kwargs: Mapping[str, Any]) -> Any:
    """Write image features over the embeddings of image tokens, and run the decoder.

    Args:
        module: The model.
        kwargs: From `forward_arguments`.

    Returns:
        Hugging Face's output, with logits.
    """
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
"""Keys of checkpoints from before transformers 5 that the classes do not read; all constants."""


# ---- BLIP-2 and MiniGPT-4: as many tokens as queries


def encode_qformer_images(parts: ProcessorParts, images: Sequence[PILImage.Image]) -> VisionInputs:
    """Encode images for a model with a Q-Former.

    Args:
        parts: Parts of the processor.
        images: The images of one row.

    Returns:
        Pixels, and the number of query tokens per image.
    """
    tensors = to_tensors(parts.image_processor(list(images)), ["pixel_values"])
    return VisionInputs(tensors, [parts.config.num_query_tokens] * len(images))


def qformer_config(size: TinySize) -> dict[str, Any]:
    """Config of a tiny Q-Former, for tests.

    Args:
        size: Sizes of the tiny model.

    Returns:
        Config values.
    """
    return {
        "vocab_size": len(size.tokenizer),
        "hidden_size": VISION_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * VISION_DIM,
        "encoder_hidden_size": VISION_DIM,
        "cross_attention_frequency": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.08,
    }


def _tiny_blip2_config(size: TinySize) -> Any:
    import transformers as hf

    text = hf.OPTConfig(
        vocab_size=len(size.tokenizer),
        hidden_size=size.hidden_size,
        word_embed_proj_dim=size.hidden_size,
        ffn_dim=2 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        init_std=0.08,
        bos_token_id=size.tokenizer.bos_token_id,
        eos_token_id=size.tokenizer.eos_token_id,
        pad_token_id=size.tokenizer.pad_token_id,
    )
    return hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**tower_config(8, 32)),
        qformer_config=hf.Blip2QFormerConfig(**qformer_config(size)),
        text_config=text,
        num_query_tokens=4,
        image_token_index=size.token_id("<image>"),
    )


def _tiny_blip2_processor(tokenizer: Any) -> Any:
    import transformers as hf

    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    return hf.Blip2Processor(image_processor=images, tokenizer=tokenizer, num_query_tokens=4)


def _processor_class() -> type:
    from transformers import Blip2Processor

    return Blip2Processor


def make_family(model_type: str, **fields: Any) -> Family:
    """Return the record of a family with BLIP-2's vision tower and Q-Former.

    Args:
        model_type: `model_type` of the config.
        **fields: Other fields of the record.

    Returns:
        The record.
    """
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
        **fields,
    )


# LAVIS puts the images before everything, then the bare question.
_LAVIS = PromptTemplate(chat=False, raw_template=("{prompt}",), answer_separator=" ", add_bos=False)

family: Family = make_family(
    "blip-2",
    title="BLIP-2 over a decoder (OPT, Llama)",
    vision=VisionFormat(
        "prefix", ("Question: {prompt} Answer:",), encode_images=encode_qformer_images
    ),
    processor=_processor_class,
    tiny=TinyModel(
        "Blip2ForConditionalGeneration", _tiny_blip2_config, _tiny_blip2_processor, add_bos=True
    ),
    templates={
        "easyedit": _LAVIS,
        "easyedit-trainer": _LAVIS,
        "vlkeb": _LAVIS,
        "mmke": _LAVIS,
        "liveedit": PromptTemplate(chat=False, raw_template=("{prompt}",)),
    },
)
