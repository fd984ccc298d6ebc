"""A checkpoint folder in Hugging Face layout, by its safetensors headers; without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from errata.functional.deltas.safetensors_header import (
    TensorSlot,
    open_regular_file,
    parse_strict_json,
    printable,
    read_header,
)
from errata.functional.errors import DeltaFileError, InvalidInputError
from errata.functional.header import FLOAT_DTYPES, Header

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "ParameterLocation",
    "checkpoint_mismatches",
    "checkpoint_model_type",
    "checkpoint_parameters",
    "shard_files",
]

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_MAX_JSON_BYTES = 64 << 20  # bytes of an index or a config


class ParameterLocation(NamedTuple):
    """Where one parameter lies: its file, what it is, and the offset of its bytes."""

    file: Path
    slot: TensorSlot
    offset: int


def shard_files(folder: str | os.PathLike[str]) -> list[str]:
    """The weight files of a checkpoint, by its index or the single one; names only, sorted.

    Raises InvalidInputError where there is none, DeltaFileError for an index that names what is no
    file of it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InvalidInputError(f"{folder} must be a folder with a checkpoint, and is none.")
    if not (path / INDEX_FILE).exists():
        if not (path / SINGLE_FILE).exists():
            raise InvalidInputError(
                f"{folder} must hold {SINGLE_FILE} or {INDEX_FILE}, and holds neither: only "
                "safetensors "
                "checkpoints are read, and pickles never."
            )
        return [SINGLE_FILE]
    body = _read_json(path / INDEX_FILE)
    weight_map = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise DeltaFileError(
            f"{path / INDEX_FILE}: the index must have a weight_map of file names."
        )
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DeltaFileError(
                f"{path / INDEX_FILE}: {printable(name, 80)!r} is no safetensors file beside it."
            )
    return files


def checkpoint_parameters(folder: str | os.PathLike[str]) -> dict[str, ParameterLocation]:
    """Every parameter of a checkpoint by its name there; only headers are read."""
    locations = {}
    for name in shard_files(folder):
        path = Path(folder) / name
        header = read_header(path)
        for key, slot in header.tensors.items():
            locations[key] = ParameterLocation(path, slot, header.data_start + slot.start)
    return locations


def checkpoint_model_type(folder: str | os.PathLike[str]) -> str:
    """The model type that the folder's config names, "" where there is none."""
    path = Path(folder) / "config.json"
    body = _read_json(path) if path.exists() else {}
    model_type = body.get("model_type", "") if isinstance(body, dict) else ""
    return model_type if isinstance(model_type, str) else ""


def checkpoint_mismatches(
    header: Header, locations: dict[str, ParameterLocation], family: str = ""
) -> list[str]:
    """How a delta fails to fit a checkpoint, by names, shapes and dtypes; values are not read."""
    mismatches = []
    if header.base.family and family and header.base.family != family:
        mismatches.append(
            f"the checkpoint is of family {printable(family, 40)!r}, not {header.base.family!r}"
        )
    for entry in header.entries:
        checkpoint_name = getattr(entry, "checkpoint_name", None)
        if checkpoint_name is None:
            continue
        if checkpoint_name not in locations:
            mismatches.append(f"the checkpoint has no {checkpoint_name!r}")
            continue
        slot = locations[checkpoint_name].slot
        if slot.shape != entry.shape:
            mismatches.append(
                f"{checkpoint_name} has shape {list(slot.shape)}, not {list(entry.shape)}"
            )
        if slot.dtype not in FLOAT_DTYPES:
            mismatches.append(
                f"{checkpoint_name} is stored as {slot.dtype}, no plain float: unpack it first"
            )
    return mismatches


def _read_json(path: Path) -> Any:
    with open_regular_file(path) as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        raise DeltaFileError(f"{path}: must have at most {_MAX_JSON_BYTES} bytes.")
    try:
        return parse_strict_json(raw, "the file")
    except ValueError as error:
        raise DeltaFileError(f"{path}: {printable(error)}.") from None
