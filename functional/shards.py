"""A checkpoint folder in Hugging Face layout, by its safetensors headers; without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from .errors import BadInput, DeltaFault
from .header import FLOATS, Header
from .safe import Slot, open_regular, plain, read_table, strict_json

__all__ = ["INDEX", "SINGLE", "Place", "family_in", "misfits", "parameters", "shards"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST = 64 << 20  # bytes of an index or a config


class Place(NamedTuple):
    """Where one parameter lies: its file, what it is, and the offset of its bytes."""

    file: Path
    slot: Slot
    at: int


def shards(folder: str | os.PathLike[str]) -> list[str]:
    """The weight files of a checkpoint, by its index or the single one; names only, sorted.

    Raises BadInput where there is none, DeltaFault for an index that names what is no file of it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise BadInput(f"{folder} must be a folder with a checkpoint, and is none.")
    if not (place / INDEX).exists():
        if not (place / SINGLE).exists():
            raise BadInput(
                f"{folder} must hold {SINGLE} or {INDEX}, and holds neither: only safetensors "
                "checkpoints are read, and pickles never."
            )
        return [SINGLE]
    body = _json(place / INDEX)
    named = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise DeltaFault(f"{place / INDEX}: the index must have a weight_map of file names.")
    files = sorted(set(named.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DeltaFault(
                f"{place / INDEX}: {plain(name, 80)!r} is no safetensors file beside it."
            )
    return files


def parameters(folder: str | os.PathLike[str]) -> dict[str, Place]:
    """Every parameter of a checkpoint by its name there; only headers are read."""
    found = {}
    for name in shards(folder):
        path = Path(folder) / name
        table = read_table(path)
        for key, slot in table.slots.items():
            found[key] = Place(path, slot, table.data + slot.start)
    return found


def family_in(folder: str | os.PathLike[str]) -> str:
    """The model type that the folder's config names, "" where there is none."""
    path = Path(folder) / "config.json"
    body = _json(path) if path.exists() else {}
    kind = body.get("model_type", "") if isinstance(body, dict) else ""
    return kind if isinstance(kind, str) else ""


def misfits(header: Header, have: dict[str, Place], family: str = "") -> list[str]:
    """How a delta fails to fit a checkpoint, by names, shapes and dtypes; values are not read."""
    wrong = []
    if header.base.family and family and header.base.family != family:
        wrong.append(
            f"the checkpoint is of family {plain(family, 40)!r}, not {header.base.family!r}"
        )
    for entry in header.entries:
        stored = getattr(entry, "checkpoint", None)
        if stored is None:
            continue
        if stored not in have:
            wrong.append(f"the checkpoint has no {stored!r}")
            continue
        slot = have[stored].slot
        if slot.shape != entry.shape:
            wrong.append(f"{stored} has shape {list(slot.shape)}, not {list(entry.shape)}")
        if slot.dtype not in FLOATS:
            wrong.append(f"{stored} is stored as {slot.dtype}, no plain float: unpack it first")
    return wrong


def _json(path: Path) -> Any:
    with open_regular(path) as file:
        raw = file.read(_MOST + 1)
    if len(raw) > _MOST:
        raise DeltaFault(f"{path}: must have at most {_MOST} bytes.")
    try:
        return strict_json(raw, "the file")
    except ValueError as error:
        raise DeltaFault(f"{path}: {plain(error)}.") from None
