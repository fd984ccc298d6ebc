"""Valid delta files of every kind."""

from __future__ import annotations

import random
from typing import Any

import torch

from errata.functional import BaseModel, Delta, EditRecord, Header
from errata.functional.kinds.schema import Dense, Experts, LowRank, Masked, Prompt, Scope
from errata.functional.kinds.scope.entry import NetworkSizes

__all__ = ["sample"]


def sample(seed: int) -> Delta:
    """A small valid delta: low-rank and dense entries, several edits, one of three dtypes.

    Args:
        seed: Seed; some seeds give other kinds.

    Returns:
        The delta.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    count = draw.randint(1, 4)
    entries: list[Any] = []
    for layer in range(draw.randint(1, 3)):
        name = f"model.language_model.layers.{layer}.mlp.down_proj.weight"
        rows = tuple(draw.randint(1, 2) for _ in range(count))
        entries.append(
            LowRank(
                name=name,
                checkpoint_name=name.replace("model.language_model", "language_model.model"),
                shape=(draw.randint(2, 9), draw.randint(2, 9)),
                rank=sum(rows),
                edit_ranks=draw.choice([rows, ()]),
                transposed=draw.random() < 0.3,
            )
        )
    entries.append(Dense(name="lm_head.bias", checkpoint_name="lm_head.bias", shape=(5,)))
    if seed > 9 and seed % 4 == 3:  # not among those that are stacked or exported
        entries.append(_experts_entry(draw, count))
    if seed > 9 and seed % 4 == 1:
        entries.append(_masked_entry(draw, count))
    if seed > 9 and seed % 4 == 2:
        entries.append(_scope_entry(draw, count))
    if draw.random() < 0.3:
        entries.append(_prompt_entry(count, draw))
    header = Header(
        editor="sample",
        settings={"rate": 1e-4, "steps": 20, "note": "é", "layers": [1, 2, None]},
        base=BaseModel(
            id="someone/model",
            family="llava",
            config_hash="0" * 64,
            parameter_hashes={entry.name: f"{k:064x}" for k, entry in enumerate(entries)},
        ),
        arithmetic=draw.choice(["act", "act_fp32", "weight"]),
        entries=tuple(entries),
        edits=tuple(
            EditRecord(id=f"edit-{k}", prompt=f"{k:064x}", target="f" * 64, images=("a" * 64,))
            for k in range(count)
        ),
    )
    tensors = {
        name: _sample_tensor(want, shape, dtype)
        for name, (want, shape) in header.tensor_specs().items()
    }
    return Delta(header, tensors)


def _sample_tensor(
    spec: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    whole = {"U8": torch.uint8, "I64": torch.int64}
    if spec[0] in whole:
        return torch.ones(shape, dtype=whole[spec[0]])
    return torch.randn(shape).to(dtype)


def _prompt_entry(count: int, draw: random.Random) -> Prompt:
    """A memory of facts in words, with or without images."""
    name = "model.language_model.embed_tokens.weight"
    return Prompt(
        name=name,
        checkpoint_name=name,
        shape=(7, 4),
        facts=tuple(f"fact {k}: <image> é\n" for k in range(count)),
        num_facts=count,
        edit_slots=tuple(range(count)),
        encoder="hashed:8",
        key_size=8,
        image_key_size=draw.choice([0, 4]),
        num_images=draw.choice([0, 1]),
        image_bytes=16,
        num_demonstrations=2,
    )


def _experts_entry(draw: random.Random, count: int) -> Experts:
    name = "model.language_model.layers.9.mlp.down_proj.weight"
    return Experts(
        name=name,
        checkpoint_name=name,
        shape=(4, 6),
        num_experts=count,
        edit_slots=tuple(range(count)),
        rank=draw.randint(1, 3),
        hidden_size=4,
        num_query_tokens=2,
        feature_dim=4,
        num_heads=2,
        num_sentinel_tokens=2,
        num_text_sentinel_tokens=1,
        routing_input=draw.choice(["query", "query_and_vision"]),
        top_k=draw.randint(0, 2),
    )


def _masked_entry(draw: random.Random, count: int) -> Masked:
    name = "model.language_model.layers.8.mlp.up_proj.weight"
    owners = tuple(draw.randrange(2) for _ in range(count))
    return Masked(
        name=name, checkpoint_name=name, shape=(4, 6), num_values=(3, 3), edit_slots=owners
    )


def _scope_entry(draw: random.Random, count: int) -> Scope:
    name = "model.language_model.lm_head.weight"
    sizes = NetworkSizes(
        hidden_size=4,
        dim=4,
        num_heads=2,
        num_classifier_layers=1,
        num_counterfactual_layers=draw.randint(1, 2),
        ffn_dim=3,
        key_dim=2,
        num_image_queries=1,
    )
    return Scope(
        name=name,
        checkpoint_name=name,
        shape=(7, 4),
        sizes=sizes,
        num_slots=count,
        max_answer_tokens=2,
        max_prompt_tokens=3,
        edit_slots=tuple(range(count)),
        gate=draw.choice(["soft", "hard"]),
    )
