"""What the tiny models of further families are made of, and the list they enrol in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional import Inputs

IMAGE, VIDEO, VOCAB = 98, 97, 99

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = {**TOWER, "projection_dim": 32}
SIGLIP = {**TOWER, "vision_use_head": False}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 32,
    "spatial_merge_size": 1,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 95,
    "vision_end_token_id": 96,
}

Sample = tuple[Any, Inputs | None]


class Other(NamedTuple):
    """One family: how to make it, and whether it must pass or be refused for a reason."""

    make: Callable[[], Sample]
    refused: str = ""  # a part of the reason


OTHERS: dict[str, Other] = {}


def family(refused: str = "") -> Callable[[Callable[[], Sample]], Callable[[], Sample]]:
    def enrol(make: Callable[[], Sample]) -> Callable[[], Sample]:
        OTHERS[make.__name__] = Other(make, refused)
        return make

    return enrol


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def rows(images: int, **pixels: Tensor) -> Inputs:
    """Two rows with an image of so many tokens each, the second two tokens shorter."""
    length = 3 + images + 7
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 90, (2, length), generator=generator)
    ids[:, 3 : 3 + images] = IMAGE
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -2:] = False
    at = torch.tensor([[length - 3, length - 2], [length - 5, length - 4]])
    return Inputs(ids, mask, ids == IMAGE, ids.gather(1, at + 1), at, pixels)


def squares() -> Tensor:
    return noise(2, 3, 16, 16)
