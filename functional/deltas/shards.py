"""A checkpoint folder in Hugging Face layout, read by its safetensors headers; without torch."""

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
    "tied_parameters",
]

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_MAX_JSON_BYTES = 64 << 20  # bytes of an index or a config


class ParameterLocation(NamedTuple):
    """The location of one parameter of a checkpoint.

    Attributes:
        file: Its shard.
        slot: Its dtype, shape and offsets within the data.
        offset: Offset of its bytes in the file.
    """

    file: Path
    slot: TensorSlot
    offset: int


def shard_files(folder: str | os.PathLike[str]) -> list[str]:
    """List the weight files of a checkpoint, from its index or the single file.

    Args:
        folder: The checkpoint.

    Returns:
        File names, sorted.

    Raises:
        InvalidInputError: If the folder has no safetensors checkpoint.
        DeltaFileError: If the index is invalid or names a file outside the folder.
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
                f"{path / INDEX_FILE}: {printable(name, 80)!r} is no safetensors file in the "
                "same folder."
            )
    return files


def checkpoint_parameters(folder: str | os.PathLike[str]) -> dict[str, ParameterLocation]:
    """Locate every parameter of a checkpoint. Only headers are read.

    Args:
        folder: The checkpoint.

    Returns:
        Checkpoint name -> location.

    Raises:
        InvalidInputError: If the folder has no safetensors checkpoint or a file cannot be read.
        DeltaFileError: If the index or a header is invalid.
    """
    locations = {}
    for name in shard_files(folder):
        path = Path(folder) / name
        header = read_header(path)
        for key, slot in header.tensors.items():
            locations[key] = ParameterLocation(path, slot, header.data_start + slot.start)
    return locations


def checkpoint_model_type(folder: str | os.PathLike[str]) -> str:
    """Return the model type in the folder's config.

    Args:
        folder: The checkpoint.

    Returns:
        The model type, "" if there is none.

    Raises:
        DeltaFileError: If the config is not valid JSON or is too large.
    """
    path = Path(folder) / "config.json"
    body = _read_json(path) if path.exists() else {}
    model_type = body.get("model_type", "") if isinstance(body, dict) else ""
    return model_type if isinstance(model_type, str) else ""


def tied_parameters(
    header: Header, folder: str | os.PathLike[str], locations: dict[str, ParameterLocation]
) -> dict[str, str]:
    """Find parameters of a delta that a checkpoint does not store, because they are tied.

    Args:
        header: Header of the delta.
        folder: The checkpoint.
        locations: The parameters of the checkpoint by name.

    Returns:
        Checkpoint name of the head to that of the embedding whose weight it shares.
    """
    path = Path(folder) / "config.json"
    body = _read_json(path) if path.exists() else {}
    parts = [body, *(p for p in body.values() if isinstance(p, dict))] if body else []
    if any(part.get("tie_word_embeddings") is False for part in parts[:1]):
        return {}
    embeddings = [
        name for name in locations if name.endswith((".embed_tokens.weight", ".wte.weight"))
    ]
    return {
        entry.checkpoint_name: embeddings[0]
        for entry in header.entries
        if entry.checkpoint_name not in locations
        and entry.checkpoint_name.rpartition(".")[0].endswith("lm_head")
        and embeddings
        and locations[embeddings[0]].slot.shape == entry.shape
    }


def checkpoint_mismatches(
    header: Header, locations: dict[str, ParameterLocation], family: str = ""
) -> list[str]:
    """Compare names, shapes and dtypes of a delta with a checkpoint. Values are not read.

    Args:
        header: Header of the delta.
        locations: The parameters of the checkpoint by name.
        family: The checkpoint's model type, "" if unknown.

    Returns:
        One phrase per violation; empty if the delta fits.
    """
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
