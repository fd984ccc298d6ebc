"""Rows of one image and many questions as one sequence: the image is embedded once.

Every question attends to the shared start of its row and to itself, and its positions continue from
that start, so each is computed exactly as if it stood alone.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from errata.adapters.zoo.configs import END, MICRO, PAD, token_id
from errata.bench.zoo.forward import FAMILIES, Pixels, prefixes
from errata.bench.zoo.image_pools import VISION_HEADS, augment
from errata.bench.zoo.questions import Row

IGNORE_INDEX = -100


class PackedBatch(NamedTuple):
    """A batch of packed rows; `heads` labels the images for the vision heads."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, 1, L, L] bool: may attend
    labels: Tensor  # [B, L]: the token that each answer position predicts
    position_ids: Tensor  # [P, B, L]
    pixels: Pixels | None
    head_labels: dict[str, Tensor]


def head_labels(rows: Sequence[dict[str, str]]) -> dict[str, Tensor]:
    """Class numbers of images by head; IGNORE_INDEX where a head does not apply.

    Args:
        rows: Labels of each image.

    Returns:
        Class numbers [B] by head.
    """
    return {
        head: torch.tensor([values.index(r[head]) if head in r else IGNORE_INDEX for r in rows])
        for head, values in VISION_HEADS.items()
    }


class SequencePacker:
    """Tokenises and packs rows for one family."""

    def __init__(self, name: str, tokenizer: Tokenizer, length: int = 128):
        self.name, self.tokenizer, self.length = name, tokenizer, length
        self.image_prefix, self.text_prefix = prefixes(name, tokenizer)
        self.question_suffix = MICRO[name].after
        self.end_id, self.pad_id = token_id(tokenizer, END), token_id(tokenizer, PAD)
        self.token_cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Encode a text, with a cache.

        Args:
            text: The text.

        Returns:
            Ids.
        """
        if text not in self.token_cache:
            self.token_cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.token_cache[text]

    def pack(
        self, rows: Sequence[Row], length: int | None = None, rng: random.Random | None = None
    ) -> PackedBatch:
        """Fill each row with as many questions as fit.

        Args:
            rows: Image and questions of each row.
            length: Tokens per row. None: the default.
            rng: Augments the images, if given.

        Returns:
            The batch.
        """
        width, axes = length or self.length, len(self.image_prefix.position_ids)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        part = np.full((len(rows), width), -1, np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        positions = np.zeros((axes, len(rows), width), np.int64)
        for b, row in enumerate(rows):
            prefix = self.image_prefix if row.image is not None else self.text_prefix
            n = len(prefix.input_ids)
            ids[b, :n], part[b, :n], positions[:, b, :n] = prefix.input_ids, 0, prefix.position_ids
            for number, (question, answer) in enumerate(row.questions, 1):
                asked = self.encode(question + self.question_suffix)
                said = self.encode(answer) + [self.end_id]
                k = len(asked) + len(said)
                if n + k > width:
                    break
                ids[b, n : n + k], part[b, n : n + k] = asked + said, number
                positions[:, b, n : n + k] = prefix.next_position + np.arange(k)
                labels[b, n + len(asked) - 1 : n + k - 1] = said
                n += k
        pictures = [row.image for row in rows if row.image is not None]
        pixels = None
        if pictures:
            stack = np.stack([p.pixels for p in pictures])
            pixels = FAMILIES[self.name].preprocess(augment(stack, rng) if rng else stack)
        return PackedBatch(
            torch.from_numpy(ids),
            question_mask(torch.from_numpy(part)),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            pixels,
            head_labels([p.labels for p in pictures]),
        )

    def pack_separately(self, items: Sequence[tuple[Any, str, str]]) -> PackedBatch:
        """Pack one question per row, as short as they allow.

        Args:
            items: (image or None, question, answer) of each row.

        Returns:
            The batch.
        """
        rows = [Row(picture, iter([(q, a)])) for picture, q, a in items]
        asked = [
            len(self.encode(q + self.question_suffix)) + len(self.encode(a)) for _, q, a in items
        ]
        return self.pack(rows, len(self.image_prefix.input_ids) + max(asked) + 1)


def question_mask(question_numbers: Tensor) -> Tensor:
    """Attention mask: a token sees earlier tokens of its own question and of the shared start (0).

    Args:
        question_numbers: Question of each token, -1 for padding, [B, L].

    Returns:
        [B, 1, L, L] of bool.
    """
    width = question_numbers.shape[1]
    causal = torch.tril(torch.ones(width, width, dtype=torch.bool))
    same = (question_numbers[:, :, None] == question_numbers[:, None, :]) | (
        question_numbers[:, None, :] == 0
    )
    real = question_numbers[:, None, :] >= 0
    return ((causal & same & real) | torch.eye(width, dtype=torch.bool))[:, None]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into the additive one that Hugging Face's attention takes.

    Args:
        mask: Mask of bool.
        dtype: Dtype of the result.

    Returns:
        Mask of the same shape.
    """
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
