"""The micro families as training sees them: pixels to image tokens, packed rows through the text.

B rows · L tokens of a packed row · P position axes · T image tokens · D width
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    VisionAttention,
    apply_rotary_pos_emb_vision,
)

from errata.adapters.zoo.assets import IMAGE_SIZE
from errata.adapters.zoo.configs import MICRO, token_id

Pixels = Mapping[str, Tensor]


class Prefix(NamedTuple):
    """The shared start of a row: its token ids, their positions [P, n], the next position."""

    input_ids: list[int]
    position_ids: np.ndarray
    next_position: int


class FamilyForward(NamedTuple):
    """How a family eats images and embeddings."""

    preprocess: Callable[[np.ndarray], Pixels]  # uint8 [B, 64, 64, 3] -> what the tower takes
    image_features: Callable[[nn.Module, Pixels], Tensor]  # -> image tokens [B, T, D]
    decoder: Callable[[Any], nn.Module]  # the decoder: embeddings in, hidden states out
    mrope_positions: Callable[[np.ndarray], tuple[np.ndarray, int]] | None = (
        None  # M-RoPE positions
    )


def normalize_pixels(pixels: np.ndarray) -> Tensor:
    """Normalise images to mean 0.5 and deviation 0.25.

    Args:
        pixels: Bytes, [B, 64, 64, 3].

    Returns:
        [B, 3, 64, 64].
    """
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def _plain_pixels(pixels: np.ndarray) -> Pixels:
    return {"pixel_values": normalize_pixels(pixels)}


def _tiled_pixels(pixels: np.ndarray) -> Pixels:
    whole = normalize_pixels(pixels)
    sizes = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * len(pixels))
    return {"pixel_values": torch.stack([whole, whole], 1), "image_sizes": sizes}


def _patched_pixels(pixels: np.ndarray) -> Pixels:
    """Qwen2-VL's patch order: 8 x 8 patches, neighbours in blocks of 2 x 2, the frame doubled."""
    rows, grid = len(pixels), IMAGE_SIZE // 8
    half = grid // 2
    x = normalize_pixels(pixels).view(rows, 1, 3, half, 2, 8, half, 2, 8)
    x = x.expand(rows, 2, 3, half, 2, 8, half, 2, 8).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    flat = x.reshape(rows * grid * grid, 3 * 2 * 8 * 8)
    return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, grid, grid]] * rows)}


def _cast(model: Any, pixels: Pixels) -> dict[str, Tensor]:
    return {**pixels, "pixel_values": pixels["pixel_values"].to(model.dtype)}


def _inner_features(model: Any, pixels: Pixels) -> Tensor:
    features = model.model.get_image_features(**_cast(model, pixels)).pooler_output
    return torch.stack(list(features)) if isinstance(features, (list, tuple)) else features


def _blip2_features(model: Any, pixels: Pixels) -> Tensor:
    return model.get_image_features(**_cast(model, pixels)).pooler_output


def _inner_text(model: Any) -> nn.Module:
    return model.model.language_model


def _blip2_text(model: Any) -> nn.Module:
    return model.language_model.model


def _mrope_positions(image: np.ndarray) -> tuple[np.ndarray, int]:
    """Time, height and width of every token of a prefix whose image tokens are marked: [3, n]."""
    side = int(image.sum() ** 0.5)
    first = int(image.argmax())
    positions = np.tile(np.arange(len(image)), (3, 1))
    rows, columns = np.divmod(np.arange(side * side), side)
    positions[:, image] = first + np.stack([0 * rows, rows, columns])
    last = len(image) - first - side * side
    positions[:, first + side * side :] = first + side + np.arange(last)
    return positions, first + side + last


FAMILIES: dict[str, FamilyForward] = {
    "llava": FamilyForward(_plain_pixels, _inner_features, _inner_text),
    "llava_onevision": FamilyForward(_tiled_pixels, _inner_features, _inner_text),
    "qwen2_vl": FamilyForward(_patched_pixels, _inner_features, _inner_text, _mrope_positions),
    "blip2": FamilyForward(_plain_pixels, _blip2_features, _blip2_text),
    "minigpt4": FamilyForward(_plain_pixels, _blip2_features, _blip2_text),
}


def prefixes(name: str, tokenizer: Tokenizer) -> tuple[Prefix, Prefix]:
    """The start of a row with an image, and of one without.

    Args:
        name: Name of the family.
        tokenizer: Its tokenizer.

    Returns:
        Both prefixes.
    """
    micro, family = MICRO[name], FAMILIES[name]
    mark = token_id(tokenizer, micro.image)
    before, opening, closing = (
        tokenizer.encode(text).ids if text else []
        for text in (micro.before, micro.opening, micro.closing)
    )
    ids = opening + [mark] * micro.num_image_tokens + closing
    if family.mrope_positions is None:
        image_prefix = Prefix(ids, np.arange(len(ids))[None], len(ids))
        return image_prefix, Prefix(before, np.arange(len(before))[None], len(before))
    positions, after = family.mrope_positions(np.array(ids) == mark)
    text_positions = np.tile(np.arange(len(before)), (len(positions), 1))
    return Prefix(ids, positions, after), Prefix(before, text_positions, len(before))


def hidden_states(
    name: str,
    model: Any,
    input_ids: Tensor,
    features: Tensor | None,
    position_ids: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Last hidden states of packed rows.

    Args:
        name: Name of the family.
        model: The model.
        input_ids: [B, L].
        features: Image features, or None.
        position_ids: [axes, B, L].
        attention_mask: Additive mask, [B, 1, L, L].

    Returns:
        [B, L, D].
    """
    embeds = model.get_input_embeddings()(input_ids)
    if features is not None:
        image = input_ids == model.config.image_token_id
        flat = features.reshape(-1, features.shape[-1]).to(embeds.dtype)
        embeds = embeds.masked_scatter(image[..., None], flat)
    axes = position_ids if FAMILIES[name].mrope_positions else position_ids[0]
    text = FAMILIES[name].decoder(model)
    return text(
        inputs_embeds=embeds, attention_mask=attention_mask, position_ids=axes, use_cache=False
    ).last_hidden_state


class BatchedVisionAttention(VisionAttention):
    """Qwen2-VL's vision attention over images of one size: one product instead of a loop."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings=(), **_):
        total, num_images = hidden_states.shape[0], len(cu_seqlens) - 1
        qkv = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1).permute(1, 0, 2, 3)
        query, key, value = qkv.unbind(0)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (
            x.view(num_images, total // num_images, self.num_heads, -1).transpose(1, 2)
            for x in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(total, -1))


def prepare(model: Any) -> Any:
    """Prepare a model for training from scratch: fan-in initialisation, batched vision attention.

    Hugging Face's 0.02 is small at these widths, and BLIP-2's queries start at zero.

    Args:
        model: The model.

    Returns:
        The same model.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.Embedding) and "token" in name:
            nn.init.normal_(module.weight, std=0.05)
        if type(module) is VisionAttention:
            module.__class__ = BatchedVisionAttention
    if hasattr(model, "query_tokens"):
        nn.init.normal_(model.query_tokens, std=0.5)
    return model
