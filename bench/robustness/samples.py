"""Valid delta files of every kind."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from errata.functional import BaseModel, Delta, EditRecord, Header, Model, Query
from errata.functional.header import SlotEntry
from errata.functional.kinds.schema import Codebook, Dense, Experts, LowRank, Masked, Prompt, Scope
from errata.functional.kinds.scope.entry import NetworkSizes

__all__ = ["SAMPLE_EDITORS", "editor_samples", "sample"]


def sample(seed: int, stacked: bool = False) -> Delta:
    """A small valid delta: low-rank and dense entries, several edits, one of three dtypes.

    Args:
        seed: Seed; some seeds give other kinds too.
        stacked: Whether the edits are independent ones of a stacked delta.

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
                edit_ranks=() if stacked else draw.choice([rows, ()]),
                transposed=draw.random() < 0.3,
            )
        )
    entries.append(Dense(name="lm_head.bias", checkpoint_name="lm_head.bias", shape=(5,)))
    if seed > 9:  # not among those that are exported
        makers = (_codebook_entry, _masked_entry, _scope_entry, _experts_entry)
        entries.append(makers[seed % 4](draw, count))
    if draw.random() < 0.3:
        entries.append(_prompt_entry(count, draw))
    if stacked:
        entries = [_as_stacked(entry, count, draw) for entry in entries]
    shared = tuple(_record(100 + k) for k in range(draw.randint(0, 2))) if stacked else ()
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
        entries=tuple(
            msgspec.structs.replace(entry, shared_slots=(0,) * len(shared))
            if isinstance(entry, SlotEntry)
            else entry
            for entry in entries
        ),
        edits=tuple(_record(k) for k in range(count)),
        stack=count if stacked else 0,
        shared_edits=shared,
        replaced_edits=((0,),) * count if shared and draw.random() < 0.5 else (),
    )
    tensors = {
        name: _sample_tensor(want, shape, dtype)
        for name, (want, shape) in header.tensor_specs().items()
    }
    return Delta(header, tensors)


def _record(number: int) -> EditRecord:
    return EditRecord(
        id=f"edit-{number}", prompt=f"{number:064x}", target="f" * 64, images=("a" * 64,)
    )


def _as_stacked(entry: Any, count: int, draw: random.Random) -> Any:
    """The entry as one of a stacked delta: every edit has all its slots."""
    if not isinstance(entry, SlotEntry):
        return entry
    if isinstance(entry, Prompt):
        entry = msgspec.structs.replace(entry, facts=entry.facts * count)
        return msgspec.structs.replace(entry, edit_slots=(0,) * count)
    return msgspec.structs.replace(entry, edit_slots=(draw.randint(-1, 0),) * count)


SAMPLE_EDITORS: Mapping[str, Mapping[str, Any]] = {
    "finetune": {"num_steps": 1},
    "lora": {"num_steps": 1, "rank": 2},
    "mend": {"sites": ["layers.-1.mlp"], "rank": 4, "edit_lr": -0.02, "untrained": True},
    "grace": {"num_steps": 1},
    "wise": {"num_steps": 1},
    "ike": {},
    "serac": {"dim": 16, "num_heads": 2, "ffn_dim": 32, "key_dim": 8, "untrained": True},
    "liveedit": {"feature_dim": 8, "num_heads": 2, "untrained": True},
}
"""Small settings of every editor, for a tiny model."""


def editor_samples() -> tuple[Model, list[Delta]]:
    """What every editor makes on a tiny model: edits in one delta, and in a stacked one.

    Returns:
        The model and the deltas, which can be bound to it.
    """
    from PIL import Image

    from errata import adapters
    from errata.editors import configure, make_editor

    model = adapters.from_module(*adapters.tiny_model("llava"))
    image = Image.new("RGB", (32, 32), (200, 40, 60))
    queries = [Query("who is it?", "bo", image), Query("where is it?", "rome", image)]
    deltas = []
    for name, settings in SAMPLE_EDITORS.items():
        editor = make_editor(configure(name, **settings))
        state = editor.init(model, torch.Generator().manual_seed(0))
        deltas += [editor.edit(model, state, queries)[0], editor.edit_each(model, state, queries)]
    return model, deltas


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


def _codebook_entry(draw: random.Random, count: int) -> Codebook:
    name = "model.language_model.layers.7.mlp.down_proj.weight"
    return Codebook(
        name=name,
        checkpoint_name=name,
        shape=(4, 6),
        num_keys=count,
        edit_slots=tuple(range(count)),
        replacement=draw.choice(["last", "prompt", "all"]),
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
