"""What training made, in a file: the tensors of a pytree under their paths, and what they fit.

A state is read back into a fresh one of the same shape, so a file holds tensors and one line of
JSON, nothing that could run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import Model
from errata.functional.errors import InvalidInputError, join_messages
from errata.functional.files import atomic_write

__all__ = [
    "WEIGHTS",
    "load_checkpoint",
    "named_tensors",
    "open_checkpoint",
    "save_checkpoint",
    "shipped_weights",
]

WEIGHTS = Path(__file__).parents[1] / "weights"
_METADATA_KEY = "errata.weights"
_OLD_METADATA_KEY = "errata.state"
_FORMAT = 2


def shipped_weights(editor: str, model: Model) -> Path:
    """The trained state that comes with the package for this editor and model.

    Raises InvalidInputError, naming those that there are.
    """
    owner, _, name = model.card.id.rpartition("/")
    path = WEIGHTS / f"{editor}-{name}.safetensors"
    if owner != "micro" or not path.is_file():
        available = sorted(found.stem for found in WEIGHTS.glob("*.safetensors"))
        raise InvalidInputError(
            f"a trained {editor} is shipped for {', '.join(available) or 'no model'}, not for "
            f"{model.card.id}: train one (`errata train`) and name its file."
        )
    return path


def named_tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors of a pytree by their path: fields, keys and numbers joined by slashes.

    >>> named_tensors({"a": (torch.ones(1),)})
    {'a/0': tensor([1.])}
    """
    pairs = pytree.tree_flatten_with_path(tree)[0]
    return {
        "/".join(map(_path_component, path)): leaf
        for path, leaf in pairs
        if isinstance(leaf, Tensor)
    }


def save_checkpoint(
    path: str | Path, tree: Any, compatibility: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write the tensors of a pytree, whole or not at all; floats of 32 bits in `dtype` if given."""
    tensors = {
        name: tensor.detach()
        .to(dtype if dtype and tensor.dtype == torch.float32 else tensor.dtype)
        .contiguous()
        .clone()
        for name, tensor in named_tensors(tree).items()
    }
    about = {**compatibility, "format": _FORMAT}
    data = save(tensors, {_METADATA_KEY: msgspec.json.encode(about, order="sorted").decode()})
    with atomic_write(path) as file:
        file.write(data)


def load_checkpoint(path: str | Path, like: Any, compatibility: Mapping[str, Any]) -> Any:
    """Read a pytree shaped and typed as `like` back.

    Raises InvalidInputError, listing every difference, unless the file's `about` says the same as
    `about` and its tensors are those of `like`.
    """
    file_compatibility, tensors = open_checkpoint(path)
    required = msgspec.json.decode(msgspec.json.encode(dict(compatibility)))
    faults = []
    if file_compatibility is None:
        faults.append(f"it has no {_METADATA_KEY} line")
    else:
        number = file_compatibility.get("format")
        if number != _FORMAT:
            faults.append(f"its format is {number!r}, must be {_FORMAT}")
        faults += [
            f"{key} is {file_compatibility.get(key)!r}, must be {value!r}"
            for key, value in required.items()
            if file_compatibility.get(key) != value
        ]
    expected_tensors = named_tensors(like)
    faults += [f"{name} is missing" for name in sorted(set(expected_tensors) - set(tensors))]
    faults += [f"{name} is not known" for name in sorted(set(tensors) - set(expected_tensors))]
    faults += [
        f"{name} is {list(tensors[name].shape)}, must be {list(expected_tensors[name].shape)}"
        for name in sorted(set(expected_tensors) & set(tensors))
        if tensors[name].shape != expected_tensors[name].shape
    ]
    if faults:
        raise InvalidInputError(f"{path} must fit what it is read for: {join_messages(faults)}.")
    pairs, spec = pytree.tree_flatten_with_path(like)
    # in the strides of `like`: products of other strides round otherwise
    leaves = [
        torch.empty_like(leaf).copy_(tensors["/".join(map(_path_component, place))])
        if isinstance(leaf, Tensor)
        else leaf
        for place, leaf in pairs
    ]
    return pytree.tree_unflatten(leaves, spec)


def open_checkpoint(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What a file says about itself, and its tensors by name.

    Raises InvalidInputError where it cannot.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            if _OLD_METADATA_KEY in stored:
                raise InvalidInputError(
                    f"{path} was made by errata before 0.1, whose names of weights differ; train "
                    "it "
                    "again."
                )
            metadata = msgspec.json.decode(stored.get(_METADATA_KEY, "null"))
            # cloned: memory of one's own, aligned as if it had just been computed
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError) as fault:
        reason = f"{path} must be a state of errata and cannot be read: {fault}."
        raise InvalidInputError(reason) from fault
    return metadata if isinstance(metadata, dict) else None, tensors


def _path_component(key: Any) -> str:
    for what in ("name", "key", "idx"):
        if hasattr(key, what):
            return str(getattr(key, what))
    return str(key)
