"""The state of an interrupted sequence of edits on disk, so that a run resumes after it.

A state is a pytree (`functional.types.State`). Its tensors go into a safetensors file, everything
else into one JSON string of its metadata. The file names no classes: NamedTuples and Structs are
rebuilt from the annotations of the class that a fresh state has. No pickle.
"""

from __future__ import annotations

import contextlib
import math
import time
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from errata.editors.common.checkpoint import is_signed, signed_text
from errata.functional import Delta
from errata.functional.files import atomic_write
from errata.functional.kinds.schema import convert_header
from errata.functional.types import State

__all__ = ["CheckpointFile", "SequenceCheckpoint", "load_checkpoint", "save_checkpoint"]

METADATA_KEY = "errata.checkpoint"


class SequenceCheckpoint(NamedTuple):
    """Where a sequence of edits is.

    Attributes:
        num_edits: The edits made.
        state: The state that the next edit starts from.
        delta: The delta so far.
    """

    num_edits: int
    state: State
    delta: Delta


class CheckpointFile:
    """One file that is overwritten at most every `every` seconds.

    Args:
        path: The file.
        identity: The run, model and editor it belongs to.
        every: Seconds between two saves, at least.
    """

    def __init__(self, path: Path, identity: str, every: float = 60.0) -> None:
        self._path, self._identity, self._every = path, identity, every
        self._last_saved = time.monotonic()

    def save(self, sequence: int, checkpoint: SequenceCheckpoint) -> None:
        """Write a checkpoint if it is time. A state that cannot be written is not saved.

        Args:
            sequence: The number of the sequence in its run.
            checkpoint: Where the sequence is.
        """
        if time.monotonic() - self._last_saved >= self._every:
            with contextlib.suppress(TypeError):
                save_checkpoint(self._path, f"{self._identity}/{sequence}", checkpoint)
            self._last_saved = time.monotonic()

    def load(self, sequence: int, fresh: State, device: torch.device) -> SequenceCheckpoint | None:
        """Read the last checkpoint of a sequence.

        Args:
            sequence: The number of the sequence in its run.
            fresh: A state of the same editor, for the classes of its values.
            device: Where the tensors go.

        Returns:
            The checkpoint, or None if there is none of this sequence.
        """
        return load_checkpoint(self._path, f"{self._identity}/{sequence}", fresh, device)

    def delete(self) -> None:
        """Remove the file, when its run is over."""
        self._path.unlink(missing_ok=True)


def save_checkpoint(path: Path, identity: str, checkpoint: SequenceCheckpoint) -> None:
    """Write a checkpoint, completely or not at all.

    Args:
        path: The file.
        identity: The run and sequence it belongs to.
        checkpoint: Where the sequence is.

    Raises:
        TypeError: If the state holds a value that cannot be rebuilt: one that is no tensor, number,
            text, container, NamedTuple or Struct, or of a class that no annotation names.
    """
    tensors: dict[str, Tensor] = {}
    state, delta = checkpoint.state, checkpoint.delta
    content = {
        "identity": identity,
        "num_edits": checkpoint.num_edits,
        "state": _encode(state, type(state), tensors),
        "header": msgspec.to_builtins(delta.header),
        "tensors": _encode(dict(delta.tensors), dict, tensors),
    }
    data = save(tensors, {METADATA_KEY: signed_text(content, tensors)})
    with atomic_write(path) as file:
        file.write(data)


def load_checkpoint(
    path: Path, identity: str, fresh: State, device: torch.device
) -> SequenceCheckpoint | None:
    """Read a checkpoint.

    Args:
        path: The file.
        identity: The run and sequence it must belong to.
        fresh: A state of the same editor, for the classes of its values.
        device: Where the tensors go.

    Returns:
        The checkpoint. None if there is none, or it is of another run, damaged, or of another
        version: then the edits are made again.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            content = msgspec.json.decode((file.metadata() or {}).get(METADATA_KEY, "null"))
            if not isinstance(content, dict) or content.get("identity") != identity:
                return None
            # cloned: memory aligned as if it had just been computed
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if not is_signed(content, tensors):
                return None
        state = _decode(content["state"], type(fresh), tensors)
        header = convert_header(content["header"])
        delta = Delta(header, _decode(content["tensors"], dict, tensors))
        return SequenceCheckpoint(content["num_edits"], state, delta)
    except (OSError, SafetensorError, msgspec.MsgspecError, LookupError, TypeError, ValueError):
        return None


def _encode(value: Any, kind: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn a value into JSON. Tensors are moved to `tensors` and leave their number."""
    if isinstance(value, Tensor):
        # the order of dimensions in memory: products of other strides round otherwise
        order = sorted(range(value.dim()), key=lambda n: -value.stride(n))
        tensors[str(len(tensors))] = value.detach().permute(order).contiguous().clone()
        return {"tensor": str(len(tensors) - 1), "order": order}
    if value is None or isinstance(value, bool | int | str):
        return {"plain": value}
    if isinstance(value, float) and math.isfinite(value):
        return {"plain": value}
    if isinstance(value, msgspec.Struct) and type(value) is _class_of(kind):
        return {"struct": msgspec.to_builtins(value)}
    if isinstance(value, tuple) and type(value) is _class_of(kind) and hasattr(value, "_fields"):
        hints, names = typing.get_type_hints(type(value)), getattr(value, "_fields")  # noqa: B009
        return {"fields": {n: _encode(getattr(value, n), hints[n], tensors) for n in names}}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        items = [_encode(item, _item_kind(kind, n), tensors) for n, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[k, _encode(v, _item_kind(kind, 1), tensors)] for k, v in value.items()]}
    raise TypeError(f"a state may not hold a {type(value).__name__} here (annotated {kind})")


def _decode(encoded: dict[str, Any], kind: Any, tensors: dict[str, Tensor]) -> Any:
    match encoded:
        case {"tensor": name, "order": order}:
            return tensors[name].permute([order.index(n) for n in range(len(order))])
        case {"plain": value}:
            return value
        case {"struct": value}:
            return msgspec.convert(value, _class_of(kind))
        case {"fields": fields}:
            named = _class_of(kind)
            hints = typing.get_type_hints(named)
            return named(**{n: _decode(value, hints[n], tensors) for n, value in fields.items()})
        case {"tuple": items}:
            return tuple(_decode(x, _item_kind(kind, n), tensors) for n, x in enumerate(items))
        case {"list": items}:
            return [_decode(x, _item_kind(kind, n), tensors) for n, x in enumerate(items)]
        case {"dict": items}:
            return {key: _decode(value, _item_kind(kind, 1), tensors) for key, value in items}
    raise ValueError(f"no value is written as {sorted(encoded)}")


def _class_of(kind: Any) -> Any:
    """Return the class that an annotation names, without `| None`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [one for one in typing.get_args(kind) if one is not type(None)]
        return members[0] if len(members) == 1 else None
    return kind


def _item_kind(kind: Any, number: int) -> Any:
    """Return the annotation of an item of a tuple or list, or (number 1) of a mapping's values."""
    kind = _class_of(kind)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is list or (origin is tuple and inside[1:] == (...,)):
        return inside[0]
    is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
    return inside[number] if (origin is tuple or is_mapping) and number < len(inside) else Any
