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

from errata.functional import BaseModel, Delta, EditRecord, Header, Model, bind
from errata.functional.deltas.inspection import decode_header, tensor_mismatches
from errata.functional.deltas.safetensors_header import (
    MAX_HEADER,
    open_regular_file,
    parse_strict_json,
    printable,
    read_header,
)
from errata.functional.deltas.serialization import (
    MAX_READ_BYTES,
    NAME_BY_DTYPE,
    stored_digest,
    tensor_view,
)
from errata.functional.errors import (
    DeltaFileError,
    ShapeError,
    UnknownSiteError,
    UnsupportedKindError,
    join_messages,
)
from errata.functional.hashing import hash_parameter
from errata.functional.header import FLOAT_DTYPES, Arithmetic, validate_header
from errata.functional.kinds.schema import LowRank

__all__ = ["CONFIG_FILE", "DELTA_FILE", "PEFT_PREFIX", "WEIGHTS_FILE", "import_peft"]

CONFIG_FILE, WEIGHTS_FILE, DELTA_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "errata.json",
)
PEFT_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20  # bytes of an adapter's configuration

_ALLOWED_KEYS = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "r",
        "bias",
        "inference_mode",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "use_rslora",
        "target_modules",
        "target_parameters",
        "rank_pattern",
        "alpha_pattern",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "peft_version",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
    }
)
"""What a LoRA's config may say without changing the arithmetic of its factors."""


def import_peft(
    folder: str | os.PathLike[str],
    model: Model | None = None,
    *,
    arithmetic: Arithmetic | None = None,
) -> Delta:
    """Read a PEFT LoRA folder as a delta of one edit. A folder of `export_peft` gives its delta
    back.

    Scales are multiplied into B. Only safetensors are read, and no pattern is run as a regex.

    Args:
        folder: The folder.
        model: The base. Names and shapes are checked against it, names of older adapters are
            translated, and its parameters are hashed. None: the base is known by name only.
        arithmetic: How the change is added. None: as PEFT does, "act_fp32", or "weight" for
            `target_parameters`, or the exported delta's own.

    Returns:
        The delta.

    Raises:
        InvalidInputError: If a file cannot be read.
        DeltaFileError: If a file is broken.
        UnsupportedKindError: For every feature that is more than a low-rank change (DoRA, biases,
            saved modules, ...).
        UnknownSiteError: If the model lacks a module of the adapter.
        ShapeError: If a factor does not fit its module.
        BaseMismatchError: If an exported delta was made for another base.
    """
    folder_path = Path(folder)
    config = _read_config(folder_path / CONFIG_FILE)
    pairs = _read_pairs(folder_path / WEIGHTS_FILE, model)
    if (folder_path / DELTA_FILE).exists():
        delta = _read_exported_delta(folder_path, pairs)
        if model is not None:
            bind(model, delta)  # refuses another base, with everything that does not fit
        head = delta.header
        return delta._replace(
            header=structs.replace(head, arithmetic=arithmetic or head.arithmetic)
        )
    resolved_arithmetic: Arithmetic = arithmetic or (
        "weight" if config.get("target_parameters") else "act_fp32"
    )
    entries: list[LowRank] = []
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in sorted(pairs.items()):
        entry = _make_entry(path, down, up, config, model)
        entries.append(entry)
        scale = _lora_scale(folder_path, path, down.shape[0], config)
        tensors[f"{entry.name}.A"] = down
        tensors[f"{entry.name}.B"] = up if scale == 1 else (up.double() * scale).to(up.dtype)
    header = Header(
        editor="peft",
        settings={"r": config.get("r"), "lora_alpha": config.get("lora_alpha")},
        base=_base_model(config, model, [entry.name for entry in entries]),
        arithmetic=resolved_arithmetic,
        entries=tuple(entries),
        edits=(EditRecord(id=printable(folder_path.resolve().name, 128) or "peft"),),
    )
    return Delta(header, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    with open_regular_file(path) as file:
        raw = file.read(_MAX_CONFIG_BYTES + 1)
    try:
        if len(raw) > _MAX_CONFIG_BYTES:
            raise ValueError("an adapter's configuration must have at most 1 MiB")
        config = parse_strict_json(raw, "the configuration")
        if not isinstance(config, dict):
            raise ValueError("the configuration must be a JSON object")
    except ValueError as error:
        raise DeltaFileError(f"{path}: {printable(error)}.") from None
    unsupported = [
        f"{key}={printable(value, 60)}"
        for key, value in config.items()
        if key not in {*_ALLOWED_KEYS, "init_lora_weights"}
        and value not in (None, False, 0, "", [], {}, "none")
    ]
    if config.get("peft_type") != "LORA":
        unsupported.insert(0, f"peft_type={printable(config.get('peft_type'), 60)}")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
        unsupported.append(
            f"init_lora_weights={printable(config['init_lora_weights'], 60)}"
        )  # moves the base
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={printable(config['bias'], 60)}")
    if unsupported:
        raise UnsupportedKindError(
            f"{path}: only a plain LoRA is a low-rank change, and this one has "
            f"{printable(join_messages(unsupported), 2000)}; merge it with PEFT and take the "
            "difference."
        )
    return config


def _read_pairs(path: Path, model: Model | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A, B), from a safetensors file that nobody vouches for.

    PEFT adds the weights of embeddings and heads that an adapter targets; they must be the base's.
    """
    table = read_header(path)
    wrong, factors = [], {}
    with open_regular_file(path) as file:
        if os.fstat(file.fileno()).st_size != table.num_bytes:
            wrong.append("the file changed while it was read")
        raw: mmap.mmap | bytearray
        if table.num_bytes <= MAX_READ_BYTES:
            raw = bytearray(file.read())
            if len(raw) != table.num_bytes:
                raise DeltaFileError(f"{path}: the file changed while it was read.")
        else:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, slot in table.tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.{1,2000})\.lora_(A|B)\.weight", name)
        saved = re.fullmatch(r"base_model\.model\.(.{1,2000}?)(\.base_layer)?\.weight", name)
        if not match and saved and slot.dtype in FLOAT_DTYPES and len(slot.shape) == 2:
            tensor = tensor_view(raw, slot.dtype, slot.shape, table.data_start + slot.start)
            wrong += _saved_weight_faults(f"{saved[1]}.weight", tensor, model)
        elif not match:
            wrong.append(f"tensor {printable(name, 120)!r} is no factor of a linear map's LoRA")
        elif slot.dtype not in FLOAT_DTYPES or len(slot.shape) != 2:
            wrong.append(f"tensor {printable(name, 120)!r} must be a matrix of floats")
        elif not wrong:
            tensor = tensor_view(raw, slot.dtype, slot.shape, table.data_start + slot.start)
            if not bool(torch.isfinite(tensor).all()):
                wrong.append(f"tensor {printable(name, 120)!r} holds NaN or infinite values")
            factors[match[1], match[2]] = tensor
    paths = sorted({path for path, _ in factors})
    for name in paths if not wrong else ():
        down, up = factors.get((name, "A")), factors.get((name, "B"))
        if down is None or up is None:
            wrong.append(f"{printable(name, 120)!r} must have both A and B")
        elif down.shape[0] != up.shape[1] or down.shape[0] < 1 or down.dtype != up.dtype:
            wrong.append(f"A and B of {printable(name, 120)!r} must have one rank and one dtype")
    if wrong or not paths:
        raise DeltaFileError(f"{path}: {join_messages(wrong) or 'the adapter has no factors'}.")
    return {name: (factors[name, "A"], factors[name, "B"]) for name in paths}


def _saved_weight_faults(name: str, tensor: Tensor, model: Model | None) -> list[str]:
    """Why a saved weight is more than a copy of the base's."""
    shown = printable(name, 120)
    if model is None:
        return [f"{shown!r} is a whole weight: pass the model, to see that it is the base's"]
    card = model.card
    memory_names = {saved: mine for mine, saved in card.checkpoint_names.items()}
    own = model.params.get(card.canonical_name(memory_names.get(name, name)))
    if own is None or own.shape != tensor.shape:
        return [f"{shown!r} is a whole weight that {card.id} does not have"]
    if not torch.equal(own.to(tensor.dtype).cpu(), tensor):
        return [f"{shown!r} holds other values than {card.id}: only copies of the base can be read"]
    return []


def _read_exported_delta(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Delta:
    """The delta that `export_peft` wrote: its own header, if it describes these very factors."""
    path = folder / DELTA_FILE
    with open_regular_file(path) as file:
        raw = file.read(MAX_HEADER + 1)
    try:
        header, claimed_digest, stored = decode_header(raw.decode("utf-8", "replace"))
        wrong = _find_mismatches(header, pairs)
        if wrong:
            raise ValueError(join_messages(wrong))
        tensors = {
            f"{entry.name}.{letter}": x
            for entry in header.entries
            for letter, x in zip("AB", pairs[entry.name.removesuffix(".weight")], strict=True)
        }
        table = {name: (NAME_BY_DTYPE[x.dtype], tuple(x.shape)) for name, x in tensors.items()}
        wrong = tensor_mismatches(header, table)
        if wrong:
            raise ValueError(join_messages(wrong))
        delta = Delta(header, tensors)
        if stored_digest(delta, stored) != claimed_digest:
            raise ValueError("it describes other factors than the adapter has; remove it to import")
    except ValueError as error:
        raise DeltaFileError(f"{path}: {printable(error)}.") from None
    return delta


def _find_mismatches(header: Header, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    wrong = validate_header(header)
    if not wrong and any(not isinstance(entry, LowRank) for entry in header.entries):
        wrong = ["a LoRA's entries must be low-rank"]
    if not wrong and {entry.name.removesuffix(".weight") for entry in header.entries} != set(pairs):
        wrong = ["it names other modules than the adapter has"]
    return wrong


def _lora_scale(folder: Path, path: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r (or alpha / sqrt r), with patterns read as names: full paths (^) or their ends."""
    alpha, pattern = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise DeltaFileError(f"{folder / CONFIG_FILE}: alpha_pattern must be an object.")
    for key, value in pattern.items():
        name = re.sub(r"\\([^A-Za-z0-9])", r"\1", key.removeprefix("^").removesuffix("$"))
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UnsupportedKindError(
                f"{folder / CONFIG_FILE}: alpha_pattern may name modules, and "
                f"{printable(key, 80)!r} is a "
                "regular expression: write the names out."
            )
        is_full_path = name.removesuffix(".weight") == path
        if is_full_path or (key[:1] != "^" and f".{path}".endswith(f".{name}")):
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise DeltaFileError(
            f"{folder / CONFIG_FILE}: alpha must be a number, is {printable(alpha, 40)!r}."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _make_entry(
    path: str, down: Tensor, up: Tensor, config: Mapping[str, Any], model: Model | None
) -> LowRank:
    name = f"{path}.weight"
    rank, in_features = down.shape
    transposed = bool(config.get("fan_in_fan_out"))
    checkpoint_name = name
    if model is not None:
        card = model.card
        memory_names = {saved: mine for mine, saved in card.checkpoint_names.items()}
        name = name if name in model.params or name in card.tied else memory_names.get(name, name)
        site = name.removesuffix(".weight")
        if site not in card.linear_shapes:
            raise UnknownSiteError(
                f"the adapter changes {printable(path, 160)!r}, which is no linear map of "
                f"{card.id}."
            )
        if card.linear_shapes[site] != (up.shape[0], in_features):
            raise ShapeError(
                f"the adapter's change of {site} is {up.shape[0]} x {in_features}, and the map of "
                f"{card.id} is {' x '.join(map(str, card.linear_shapes[site]))}."
            )
        transposed = site in card.transposed
        checkpoint_name = card.checkpoint_name(name)
    shape = (in_features, up.shape[0]) if transposed else (up.shape[0], in_features)
    return LowRank(
        name=name,
        checkpoint_name=checkpoint_name,
        shape=shape,
        rank=rank,
        edit_ranks=(rank,),
        transposed=transposed,
    )


def _base_model(config: Mapping[str, Any], model: Model | None, names: list[str]) -> BaseModel:
    if model is None:
        id = printable(config.get("base_model_name_or_path") or "unknown", 256)
        id = os.path.basename(os.path.normpath(id)) if os.path.isabs(id) else id
        return BaseModel(
            id=id.replace("..", "") or "unknown", revision=str(config.get("revision") or "")
        )
    card = model.card
    parameter_hashes = {
        name: hash_parameter(model.params[card.canonical_name(name)]) for name in sorted(set(names))
    }
    return BaseModel(
        id=card.id,
        revision=card.revision,
        family=card.family,
        config_hash=card.config_hash,
        parameter_hashes=parameter_hashes,
    )
