"""Read PEFT's LoRA folders as deltas, from hands nobody vouches for; PEFT is not needed here."""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from errata.functional import Base, Delta, EditRecord, Header, LowRank, Model, bind
from errata.functional.errors import (
    DeltaFault,
    KindUnsupported,
    ShapeMismatch,
    UnknownSite,
    listed,
)
from errata.functional.fingerprint import fingerprint
from errata.functional.header import FLOATS, Form, faults
from errata.functional.io import NAMES, digest, view
from errata.functional.peek import decode, misfits
from errata.functional.safe import MAX_HEADER, open_regular, plain, read_table, strict_json

__all__ = ["CONFIG", "PREFIX", "RECORD", "WEIGHTS", "from_peft"]

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "errata.json"
PREFIX = "base_model.model."
_MOST = 1 << 20  # bytes of an adapter's configuration

_NEUTRAL = frozenset({
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "r", "bias",
    "inference_mode", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "target_modules",
    "target_parameters", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform",
    "layers_pattern", "peft_version", "megatron_core", "runtime_config", "qalora_group_size",
})  # fmt: skip
"""What a LoRA's config may say without changing the arithmetic of its factors."""


def from_peft(
    folder: str | os.PathLike[str], model: Model | None = None, *, form: Form | None = None
) -> Delta:
    """Read a PEFT LoRA folder as a delta of one edit (or, written by `to_peft`, as it was).

    Scales are folded into B. `form` None is what PEFT does by itself: "act_fp32", or "weight" for
    `target_parameters` (or, written by `to_peft`, the delta's own). With `model` names and shapes
    are checked, older adapters' names (those of the checkpoint) are understood, and the parameters
    touched are fingerprinted; without it the base is only known by name. Only safetensors are read,
    and no pattern is run as a regex.

    Raises BadInput and DeltaFault for broken files, KindUnsupported naming every feature that is
    more than a low-rank change (DoRA, biases, saved modules, ...), UnknownSite, ShapeMismatch, and
    BaseMismatch for a delta written by `to_peft` from another base.
    """
    place = Path(folder)
    config = _read_config(place / CONFIG)
    pairs = _read_pairs(place / WEIGHTS)
    if (place / RECORD).exists():
        delta = _restored(place, pairs)
        if model is not None:
            bind(model, delta)  # refuses another base, with everything that does not fit
        head = delta.header
        return delta._replace(header=structs.replace(head, form=form or head.form))
    kind: Form = form or ("weight" if config.get("target_parameters") else "act_fp32")
    entries: list[LowRank] = []
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in sorted(pairs.items()):
        entry = _entry(path, down, up, config, model)
        entries.append(entry)
        scale = _scale(place, path, down.shape[0], config)
        tensors[f"{entry.name}.A"] = down
        tensors[f"{entry.name}.B"] = up if scale == 1 else (up.double() * scale).to(up.dtype)
    header = Header(
        editor="peft",
        settings={"r": config.get("r"), "lora_alpha": config.get("lora_alpha")},
        base=_base(config, model, [entry.name for entry in entries]),
        form=kind,
        entries=tuple(entries),
        edits=(EditRecord(id=plain(place.resolve().name, 128) or "peft"),),
    )
    return Delta(header, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        raw = file.read(_MOST + 1)
    try:
        if len(raw) > _MOST:
            raise ValueError("an adapter's configuration must have at most 1 MiB")
        config = strict_json(raw, "the configuration")
        if not isinstance(config, dict):
            raise ValueError("the configuration must be a JSON object")
    except ValueError as error:
        raise DeltaFault(f"{path}: {plain(error)}.") from None
    odd = [
        f"{key}={plain(value, 60)}"
        for key, value in config.items()
        if key not in {*_NEUTRAL, "init_lora_weights"}
        and value not in (None, False, 0, "", [], {}, "none")
    ]
    if config.get("peft_type") != "LORA":
        odd.insert(0, f"peft_type={plain(config.get('peft_type'), 60)}")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
        odd.append(f"init_lora_weights={plain(config['init_lora_weights'], 60)}")  # moves the base
    if config.get("bias", "none") != "none":
        odd.append(f"bias={plain(config['bias'], 60)}")
    if odd:
        raise KindUnsupported(
            f"{path}: only a plain LoRA is a low-rank change, and this one has "
            f"{plain(listed(odd), 2000)}; merge it with PEFT and take the difference."
        )
    return config


def _read_pairs(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A, B), from a safetensors file that nobody vouches for."""
    table = read_table(path)
    wrong, halves = [], {}
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size != table.size:
            wrong.append("the file changed while it was read")
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, slot in table.slots.items():
        match = re.fullmatch(r"base_model\.model\.(.{1,2000})\.lora_(A|B)\.weight", name)
        if not match:
            wrong.append(f"tensor {plain(name, 120)!r} is no factor of a linear map's LoRA")
        elif slot.dtype not in FLOATS or len(slot.shape) != 2:
            wrong.append(f"tensor {plain(name, 120)!r} must be a matrix of floats")
        elif not wrong:
            tensor = view(raw, slot.dtype, slot.shape, table.data + slot.start)
            if not bool(torch.isfinite(tensor).all()):
                wrong.append(f"tensor {plain(name, 120)!r} holds NaN or infinite values")
            halves[match[1], match[2]] = tensor
    paths = sorted({path for path, _ in halves})
    for name in paths if not wrong else ():
        down, up = halves.get((name, "A")), halves.get((name, "B"))
        if down is None or up is None:
            wrong.append(f"{plain(name, 120)!r} must have both A and B")
        elif down.shape[0] != up.shape[1] or down.shape[0] < 1 or down.dtype != up.dtype:
            wrong.append(f"A and B of {plain(name, 120)!r} must have one rank and one dtype")
    if wrong or not paths:
        raise DeltaFault(f"{path}: {listed(wrong) or 'the adapter has no factors'}.")
    return {name: (halves[name, "A"], halves[name, "B"]) for name in paths}


def _restored(place: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Delta:
    """The delta that `to_peft` wrote: its own header, if it describes these very factors."""
    path = place / RECORD
    with open_regular(path) as file:
        raw = file.read(MAX_HEADER + 1)
    try:
        header, claimed = decode(raw.decode("utf-8", "replace"))
        wrong = _mismatch(header, pairs)
        if wrong:
            raise ValueError(listed(wrong))
        tensors = {
            f"{entry.name}.{letter}": x
            for entry in header.entries
            for letter, x in zip("AB", pairs[entry.name.removesuffix(".weight")], strict=True)
        }
        table = {name: (NAMES[x.dtype], tuple(x.shape)) for name, x in tensors.items()}
        wrong = misfits(header, table)
        if wrong:
            raise ValueError(listed(wrong))
        delta = Delta(header, tensors)
        if digest(delta) != claimed:
            raise ValueError("it describes other factors than the adapter has; remove it to import")
    except ValueError as error:
        raise DeltaFault(f"{path}: {plain(error)}.") from None
    return delta


def _mismatch(header: Header, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    wrong = faults(header)
    if not wrong and any(not isinstance(entry, LowRank) for entry in header.entries):
        wrong = ["a LoRA's entries must be low-rank"]
    if not wrong and {entry.name.removesuffix(".weight") for entry in header.entries} != set(pairs):
        wrong = ["it names other modules than the adapter has"]
    return wrong


def _scale(place: Path, path: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r (or alpha / sqrt r), with patterns read as names: full paths (^) or their ends."""
    alpha, pattern = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise DeltaFault(f"{place / CONFIG}: alpha_pattern must be an object.")
    for key, value in pattern.items():
        name = re.sub(r"\\([^A-Za-z0-9])", r"\1", key.removeprefix("^").removesuffix("$"))
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise KindUnsupported(
                f"{place / CONFIG}: alpha_pattern may name modules, and {plain(key, 80)!r} is a "
                "regular expression: write the names out."
            )
        whole = name.removesuffix(".weight") == path
        if whole or (key[:1] != "^" and f".{path}".endswith(f".{name}")):
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise DeltaFault(f"{place / CONFIG}: alpha must be a number, is {plain(alpha, 40)!r}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _entry(
    path: str, down: Tensor, up: Tensor, config: Mapping[str, Any], model: Model | None
) -> LowRank:
    name = f"{path}.weight"
    rank, inner = down.shape
    flip = bool(config.get("fan_in_fan_out"))
    stored = name
    if model is not None:
        card = model.card
        back = {saved: mine for mine, saved in card.checkpoint.items()}
        name = name if name in model.params or name in card.ties else back.get(name, name)
        site = name.removesuffix(".weight")
        if site not in card.linears:
            raise UnknownSite(
                f"the adapter changes {plain(path, 160)!r}, which is no linear map of {card.id}."
            )
        if card.linears[site] != (up.shape[0], inner):
            raise ShapeMismatch(
                f"the adapter's change of {site} is {up.shape[0]} x {inner}, and the map of "
                f"{card.id} is {' x '.join(map(str, card.linears[site]))}."
            )
        flip = site in card.transposed
        stored = card.checkpoint.get(name, name)
    shape = (inner, up.shape[0]) if flip else (up.shape[0], inner)
    return LowRank(
        name=name, checkpoint=stored, shape=shape, rank=rank, rows=(rank,), transposed=flip
    )


def _base(config: Mapping[str, Any], model: Model | None, names: list[str]) -> Base:
    if model is None:
        id = plain(config.get("base_model_name_or_path") or "unknown", 256)
        id = os.path.basename(os.path.normpath(id)) if os.path.isabs(id) else id
        return Base(
            id=id.replace("..", "") or "unknown", revision=str(config.get("revision") or "")
        )
    card = model.card
    touched = {
        name: fingerprint(model.params[card.ties.get(name, name)]) for name in sorted(set(names))
    }
    return Base(
        id=card.id, revision=card.revision, family=card.family, config=card.config, touched=touched
    )
