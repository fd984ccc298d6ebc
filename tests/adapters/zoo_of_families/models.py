"""Tiny models and rows for the laws of adapters, made once per run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from errata.adapters.families.table import family_of, tiny_families
from errata.adapters.hf import functional_model, structure
from errata.adapters.inputs.prompt_format import make_detokenizer
from errata.adapters.loading.query_processor import make_processor
from errata.adapters.zoo.tiny import tiny_model
from errata.functional import Inputs, Model, Query

LAYERS = 4
NAMES = tuple(tiny_families())
VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class Made(NamedTuple):
    """A tiny Hugging Face module and the functional model built from it."""

    module: Any
    model: Model


@functools.cache
def made(name: str) -> Made:
    module, processor = tiny_model(name, num_layers=LAYERS)
    roughen(module)
    family = family_of(module.config.model_type)
    card = structure.describe_module(module, family)
    tokenizer = getattr(processor, "tokenizer", processor)
    read = make_processor(processor, module.config, card)
    return Made(
        module, functional_model.functionalize(card, module, read, make_detokenizer(tokenizer))
    )


def roughen(module: torch.nn.Module, seed: int = 1) -> None:
    """Weights large enough that a wrong token or position shows, and norms that are not ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 25
            noise = torch.randn(parameter.shape, generator=generator) / fan**0.5
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)


def make_image(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """An image of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())


def queries(name: str) -> list[Query]:
    """Rows of different lengths: with one image, without, and with several where they go."""
    model = made(name).model
    rows = [
        Query("what is in the city of the river?", "a cat"),
        Query("where?", "the old town of the capital"),
    ]
    if model.card.takes_images:
        rows.insert(1, Query("what is in the picture?", "a red dog", (make_image(1),)))
        rows.append(Query("who wrote the book?", "cat", (make_image(2),)))
    if model.card.takes_several_images:
        rows.append(Query("which is left?", "the chair", (make_image(3), make_image(4))))
    return rows


def whole(module: Any, name: str, inputs: Inputs) -> Tensor:
    """Logits [B L V] of the module's own forward, with the attention it came with."""
    # Padding may have the id that MiniGPT-4 writes at image positions; it is masked anyway.
    kwargs = arguments(name)(
        inputs._replace(input_ids=inputs.input_ids.masked_fill(~inputs.attention_mask, 40))
    )
    with torch.no_grad():
        return module(**kwargs, use_cache=False).logits


def arguments(name: str) -> Callable[[Inputs], dict[str, Any]]:
    """What a user of Hugging Face would pass; positions are the module's own business."""

    def given(inputs: Inputs) -> dict[str, Any]:
        base = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask.long(),
            **inputs.vision_inputs,
        }
        if name.startswith("qwen") and inputs.vision_inputs:
            ids = made(name).module.config
            kinds = (inputs.input_ids == ids.image_token_id).int()
            base["mm_token_type_ids"] = kinds + 2 * (inputs.input_ids == ids.video_token_id).int()
        return base

    return given
