"""Where a sequence of edits stands, on disk, so that a killed run need not make them again.

A state is a pytree of tensors, NamedTuples, msgspec Structs, dicts, tuples, lists and plain values
(`functional.types.State`). Its tensors go into a safetensors file, its shape into one JSON string
of metadata; classes are written by name and only those of errata are ever looked up. No pickle.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from errata.functional import Delta, Header
from errata.functional.files import atomic_write
from errata.functional.kinds.schema import convert_header

__all__ = ["CheckpointFile", "SequenceCheckpoint", "load_checkpoint", "save_checkpoint"]

METADATA_KEY = "errata.checkpoint"


class SequenceCheckpoint(NamedTuple):
    """After `edits` edits of a group: the state the next one starts from, and the delta so far."""

    num_edits: int
    state: Any
    delta: Delta


class CheckpointFile:
    """One file that is written over now and then, at most every `every` seconds."""

    def __init__(self, path: Path, identity: str, every: float = 60.0) -> None:
        self._path, self._identity, self._every = path, identity, every
        self._last_saved = time.monotonic()

    def save(self, sequence: int, checkpoint: SequenceCheckpoint) -> None:
        """Write a mark if it is time; a state that cannot be written is left to be made again."""
        if time.monotonic() - self._last_saved >= self._every:
            with contextlib.suppress(TypeError):
                save_checkpoint(self._path, f"{self._identity}/{sequence}", checkpoint)
            self._last_saved = time.monotonic()

    def load(self, sequence: int, device: torch.device) -> SequenceCheckpoint | None:
        """The last mark of this group, or None."""
        return load_checkpoint(self._path, f"{self._identity}/{sequence}", device)

    def delete(self) -> None:
        """Remove the file: its run is over."""
        self._path.unlink(missing_ok=True)


def save_checkpoint(path: Path, identity: str, checkpoint: SequenceCheckpoint) -> None:
    """Write a mark, whole or not at all; `about` says which run and group it belongs to.

    Raises TypeError for a state that holds something other than the values named above.
    """
    tensors: dict[str, Tensor] = {}
    plan = {
        "identity": identity,
        "num_edits": checkpoint.num_edits,
        "tree": _encode(checkpoint[1:], tensors),
    }
    data = save(tensors, {METADATA_KEY: msgspec.json.encode(plan).decode()})
    with atomic_write(path) as file:
        file.write(data)


def load_checkpoint(path: Path, identity: str, device: torch.device) -> SequenceCheckpoint | None:
    """The mark in a file, or None where there is none of this run and group."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            plan = msgspec.json.decode((file.metadata() or {}).get(METADATA_KEY, "null"))
            if not isinstance(plan, dict) or plan.get("identity") != identity:
                return None
            # cloned: memory of one's own, aligned as if it had just been computed
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return SequenceCheckpoint(plan["num_edits"], *_decode(plan["tree"], tensors))
    except (OSError, SafetensorError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None  # of another version, or not whole: the edits are made again


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What a value looks like as JSON; its tensors are put aside under a number each."""
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().contiguous().clone()
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, msgspec.Struct):
        return {"struct": _class_name(type(value)), "value": msgspec.to_builtins(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {
            "named": _class_name(type(value)),
            "items": [_encode(one, tensors) for one in value],
        }
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(one, tensors) for one in value]}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _encode(one, tensors)] for key, one in value.items()]}
    if value is None or isinstance(value, bool | int | str) or _is_finite_float(value):
        return {"plain": value}
    raise TypeError(f"a state may not hold a {type(value).__name__}")


def _decode(encoded: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    match encoded:
        case {"tensor": name}:
            return tensors[name]
        case {"struct": name, "value": value}:
            kind = _load_class(name)
            return convert_header(value) if kind is Header else msgspec.convert(value, kind)
        case {"named": name, "items": items}:
            return _load_class(name)(*(_decode(one, tensors) for one in items))
        case {"tuple": items}:
            return tuple(_decode(one, tensors) for one in items)
        case {"list": items}:
            return [_decode(one, tensors) for one in items]
        case {"dict": items}:
            return {key: _decode(one, tensors) for key, one in items}
        case {"plain": value}:
            return value
    raise ValueError(f"no value is written as {sorted(encoded)}")


def _is_finite_float(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _class_name(kind: type) -> str:
    if not _is_errata_module(kind.__module__) or "." in kind.__qualname__:
        raise TypeError(f"a state may not hold a {kind.__module__}.{kind.__qualname__}")
    return f"{kind.__module__}:{kind.__qualname__}"


def _load_class(name: str) -> type:
    module, _, attribute = name.partition(":")
    if not _is_errata_module(module):
        raise ValueError(f"{module} is not of errata")
    kind = getattr(sys.modules.get(module) or import_module(module), attribute, None)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct | tuple):
        return kind
    raise ValueError(f"{name} is no NamedTuple and no Struct")


def _is_errata_module(module: str) -> bool:
    return module.startswith(("errata.functional.", "errata.editors."))
