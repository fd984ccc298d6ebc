"""Deltas as PEFT's LoRA folders and back, so that what already serves adapters serves edits.

Facts about the format were read in PEFT 0.21.2 (https://github.com/huggingface/peft), vLLM's
`lora/peft_helper.py` and SGLang's `lora_config.py`; PEFT itself is not needed here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from errata.adapters.interop.peft_import import (
    CONFIG_FILE,
    DELTA_FILE,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    import_peft,
)
from errata.functional import Delta
from errata.functional.deltas.inspection import encode_header
from errata.functional.deltas.safetensors_header import build_header
from errata.functional.deltas.serialization import NAME_BY_DTYPE, digest, tensor_bytes
from errata.functional.errors import InvalidInputError, UnsupportedKindError, join_messages
from errata.functional.files import atomic_folder
from errata.functional.kinds.schema import LowRank

__all__ = ["SERVABLE_RANKS", "PeftExport", "export_peft", "import_peft"]

SERVABLE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM serves."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "shared")
_OUTSIDE = re.compile(r"(^|[._])(vision|visual|projector|merger|qformer|language_projection)")


class PeftExport(NamedTuple):
    """A written adapter: where, PEFT's argument that computes the same, and what is inexact."""

    folder: Path
    autocast_adapter_dtype: bool
    inexact: tuple[str, ...]


def export_peft(
    delta: Delta,
    folder: str | os.PathLike[str],
    profile: Literal["peft", "serving"] = "peft",
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PeftExport:
    """Write a low-rank delta as a PEFT LoRA folder.

    "peft" is exact. Every scale is 1 (alpha = rank) and modules have their full path. Loaded with
    the returned `autocast_adapter_dtype`, PEFT computes this delta's arithmetic bit for bit:
    "act" and "act_fp32" as LoRA layers, "weight" through `target_parameters`. `import_peft` gives
    the same delta.

    "serving" is what vLLM and SGLang load: one rank, padded with zero rows to one of
    `SERVABLE_RANKS`, no patterns, linear maps of the decoder only. If one of q, k, v (or gate,
    up) is changed, its siblings get zeros. Servers compute in activation form.

    Args:
        delta: A low-rank delta.
        folder: The folder to make.
        profile: "peft" or "serving".
        shapes: Stored shapes of parameters by in-memory or checkpoint name, for the siblings of
            "serving".
        dtype: Of the factors in "serving".

    Returns:
        How to load the folder, and what is inexact.

    Raises:
        UnsupportedKindError: For what a LoRA cannot express, with the alternative.
        InvalidInputError: If the folder exists or cannot be written.
    """
    refusals = list(_refusals(delta, profile))
    if refusals:
        raise UnsupportedKindError(
            f"the delta cannot be written as a LoRA: {join_messages(refusals)}."
        )
    factors = _factors(delta)
    inexact: list[str] = []
    if profile == "serving":
        factors, inexact = _serving_factors(delta, factors, shapes or {}, dtype)
    config = _config(delta, factors, profile)
    tensors = {
        f"{PEFT_PREFIX}{path}.lora_{letter}.weight": x
        for path, pair in factors.items()
        for letter, x in zip("AB", pair, strict=True)
    }
    autocast = delta.header.arithmetic != "act" or profile == "serving"
    with atomic_folder(folder) as part:
        table = {name: (NAME_BY_DTYPE[x.dtype], tuple(x.shape)) for name, x in tensors.items()}
        head, order = build_header({"format": "pt"}, table)
        with (part / WEIGHTS_FILE).open("wb") as file:
            file.write(head)
            for name in order:
                file.write(tensor_bytes(tensors[name]))
        (part / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (part / "README.md").write_text(_readme(delta, profile, autocast, inexact))
        if profile == "peft":
            (part / DELTA_FILE).write_text(encode_header(delta.header, digest(delta)))
    return PeftExport(Path(folder), autocast, tuple(inexact))


def _refusals(delta: Delta, profile: str) -> Iterator[str]:
    header = delta.header
    if profile not in ("peft", "serving"):
        yield f"the profile must be 'peft' or 'serving', is {profile!r}"
    if header.stack:
        yield "it is stacked: export each of `stacking.unstack(delta)`"
    if not header.entries:
        yield "it changes nothing"
    for entry in header.entries:
        kind = type(entry).__name__.lower()
        if kind == "dense":
            yield (
                f"{entry.name} is a dense change: `compress` it to a rank first (the loss is "
                "reported), or `fuse` it into a checkpoint"
            )
        elif not isinstance(entry, LowRank):
            yield (
                f"kind {kind!r} decides per input what to change, which a LoRA cannot: serve it "
                "with `bind`"
            )
        elif not entry.name.endswith(".weight"):
            yield f"{entry.name} is not the weight of a module: `fuse` it into a checkpoint"
        elif entry.name.split(".")[-2] in _EMBEDDINGS:
            yield f"{entry.name} is an embedding, no linear map: `fuse` it into a checkpoint"
        elif entry.transposed and header.arithmetic == "weight" and profile == "peft":
            yield (
                f"{entry.name} is stored transposed, where PEFT's target_parameters do not go: "
                "give the delta arithmetic 'act', or `fuse` it"
            )
        elif profile == "serving" and _OUTSIDE.search(entry.name):
            yield f"{entry.name} is outside the decoder, which servers drop: `fuse` it"
        elif profile == "serving" and entry.rank > SERVABLE_RANKS[-1]:
            yield f"{entry.name} has rank {entry.rank}, servers take {SERVABLE_RANKS[-1]}: `compress` it"  # noqa: E501


def _factors(delta: Delta) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        entry.name.removesuffix(".weight"): (
            delta.tensors[f"{entry.name}.A"],
            delta.tensors[f"{entry.name}.B"],
        )
        for entry in delta.header.entries
    }


def _serving_factors(
    delta: Delta,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """One rank, one dtype, no lone siblings; and what of it is inexact."""
    max_rank = max(down.shape[0] for down, _ in factors.values())
    rank = next(served for served in SERVABLE_RANKS if served >= max_rank)
    sizes = {path: (up.shape[0], down.shape[1]) for path, (down, up) in factors.items()}
    sizes |= _sibling_shapes(delta, shapes)
    inexact = []
    if delta.header.arithmetic == "weight" or any(
        x.dtype != dtype for p in factors.values() for x in p
    ):
        inexact.append(
            f"servers add the change in activation form with {str(dtype).removeprefix('torch.')} "
            f"factors; the delta's arithmetic is {delta.header.arithmetic!r}, so logits differ by "
            "rounding"
        )
    padded = {}
    for path, (out_features, in_features) in sizes.items():
        down, up = (
            torch.zeros(rank, in_features, dtype=dtype, device="cpu"),
            torch.zeros(out_features, rank, dtype=dtype, device="cpu"),
        )
        if path in factors:
            count = factors[path][0].shape[0]
            down[:count], up[:, :count] = factors[path][0].to(dtype), factors[path][1].to(dtype)
        padded[path] = (down, up)
    return dict(sorted(padded.items())), inexact


def _sibling_shapes(
    delta: Delta, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    edited_names = {entry.name for entry in delta.header.entries}
    sibling_shapes, unknown = {}, []
    for entry in delta.header.entries:
        last = entry.name.split(".")[-2]
        for group in (group for group in _SIBLINGS if last in group):
            for other in group:
                name, checkpoint_name = (
                    text.replace(f".{last}.weight", f".{other}.weight")
                    for text in (entry.name, entry.checkpoint_name)
                )
                shape = shapes.get(name) or shapes.get(checkpoint_name)
                if name in edited_names:
                    continue
                if shape is None or len(shape) != 2:
                    unknown.append(name)
                else:
                    sibling_shapes[name.removesuffix(".weight")] = (shape[0], shape[1])
    if unknown:
        raise InvalidInputError(
            "servers stack q, k, v and gate, up, so a lone one needs zeros for its siblings: pass "
            "`shapes` (`--base` on the command line) with those of "
            f"{join_messages(sorted(set(unknown)))}."
        )
    return sibling_shapes


def _config(
    delta: Delta, factors: Mapping[str, tuple[Tensor, Tensor]], profile: str
) -> dict[str, Any]:
    header = delta.header
    ranks = {path: down.shape[0] for path, (down, _) in factors.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": _auto_mapping(header.base.family),
        "base_model_name_or_path": header.base.id,
        "revision": header.base.revision or None,
        "inference_mode": True,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(getattr(entry, "transposed", False) for entry in header.entries),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    if profile == "serving":
        names = sorted({path.rpartition(".")[2] for path in factors})
        return {**config, "target_modules": names}
    weight = header.arithmetic == "weight"
    named = {f"{path}.weight" if weight else path: rank for path, rank in ranks.items()}
    pattern = {"^" + re.escape(name): rank for name, rank in named.items()}
    config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    if weight:
        return {**config, "target_modules": [], "target_parameters": sorted(named)}
    return {**config, "target_modules": "|".join(re.escape(path) for path in sorted(named))}


def _auto_mapping(family: str) -> dict[str, str] | None:
    """The class AutoPeftModel is to load, where transformers knows the family."""
    from transformers.models.auto import modeling_auto as auto

    for table in (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        name = table.get(family)
        if isinstance(name, str):
            return {"base_model_class": name, "parent_library": "transformers"}
    return None


def _readme(delta: Delta, profile: str, autocast: bool, inexact: list[str]) -> str:
    header = delta.header
    edits = f"{len(header.edits)} edit(s) by {header.editor or 'an unnamed editor'}"
    lines = [
        "---",
        f"base_model: {json.dumps(header.base.id)}",
        "base_model_relation: adapter",
        "library_name: peft",
        "tags: [lora, errata, model-editing]",
        "---",
        "",
        f"A knowledge edit of {header.base.id} as a LoRA: {edits}, arithmetic "
        f"`{header.arithmetic}`,",
        f"profile `{profile}`, digest `{digest(delta)}`.",
        "",
    ]
    if profile == "peft":
        lines += [
            "Bit for bit what errata computes when loaded as",
            "",
            f"    PeftModel.from_pretrained(base, folder, autocast_adapter_dtype={autocast})",
            "",
        ]
    return "\n".join(lines + [f"{note[0].upper()}{note[1:]}." for note in inexact]) + "\n"
