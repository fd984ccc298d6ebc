"""Files of trained weights: the tensors of a pytree under their paths, and what they must fit.

A file holds tensors and one line of JSON, nothing executable. It is read into a fresh pytree of the
same structure.
"""

from __future__ import annotations

import hashlib
import os
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
from errata.functional.hashing import hash_parameter

__all__ = [
    "WEIGHTS",
    "is_signed",
    "load_checkpoint",
    "named_tensors",
    "open_checkpoint",
    "save_checkpoint",
    "shipped_weights",
    "signed_text",
]

WEIGHTS = Path(__file__).parents[1] / "weights"
_METADATA_KEY = "errata.weights"
_OLD_METADATA_KEY = "errata.state"
_FORMAT = 2


def shipped_weights(editor: str, model: Model) -> Path:
    """Find the trained weights that the package ships for an editor and a model.

    Args:
        editor: Name of the editor.
        model: The model. Weights are shipped for the `micro/` models only.

    Returns:
        Path of the file.

    Raises:
        InvalidInputError: If none are shipped for this pair. Lists those that are.
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
    """Flatten a pytree into its tensors by path: fields, keys and indices joined by slashes.

    Args:
        tree: A pytree. Leaves that are not tensors are left out.

    Returns:
        The tensors by path.

    Example:
        >>> named_tensors({"a": (torch.ones(1),)})
        {'a/0': tensor([1.])}
    """
    pairs = pytree.tree_flatten_with_path(tree)[0]
    return {
        "/".join(map(_path_component, path)): leaf
        for path, leaf in pairs
        if isinstance(leaf, Tensor)
    }


def signed_text(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write the description of a file, with a digest of itself and of the tensors.

    One text under one key: the order of several keys differs from file to file.

    Args:
        content: The description, without its digest.
        tensors: The tensors by name.

    Returns:
        JSON.
    """
    digest = _content_digest(content, tensors)
    return msgspec.json.encode({**content, "digest": digest}, order="sorted").decode()


def is_signed(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a description's digest is that of itself and of the tensors.

    Args:
        description: From the text of `signed_text`.
        tensors: The tensors by name.

    Returns:
        True if nothing was changed.
    """
    content = {name: value for name, value in description.items() if name != "digest"}
    return description.get("digest") == _content_digest(content, tensors)


def _content_digest(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(msgspec.json.encode(content, order="sorted"))
    for name, tensor in sorted(tensors.items()):
        state.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(hash_parameter(tensor.detach().contiguous()).encode())
    return state.hexdigest()


def save_checkpoint(
    path: str | Path, tree: Any, compatibility: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write the tensors of a pytree to a file, atomically.

    Args:
        path: The file.
        tree: The pytree. Only its tensors are written.
        compatibility: What a reader must match, as JSON: settings, sites, hashes.
        dtype: Type in which float32 tensors are stored. None: as they are.
    """
    tensors = {
        name: tensor.detach()
        .to(dtype if dtype and tensor.dtype == torch.float32 else tensor.dtype)
        .contiguous()
        .clone()
        for name, tensor in named_tensors(tree).items()
    }
    about = {**compatibility, "format": _FORMAT}
    data = save(tensors, {_METADATA_KEY: signed_text(about, tensors)})
    with atomic_write(path) as file:
        file.write(data)


def load_checkpoint(path: str | Path, like: Any, compatibility: Mapping[str, Any]) -> Any:
    """Read a pytree from a file, in the structure, dtypes and strides of `like`.

    Args:
        path: The file.
        like: A pytree whose tensors have the paths and shapes of the file's. Supplies all other
            leaves.
        compatibility: Values that the file must hold under the same names.

    Returns:
        A copy of `like` with the file's tensors.

    Raises:
        InvalidInputError: If the file cannot be read, or its format, `compatibility`, tensor names
            or shapes differ. Lists all differences.
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
    # Keep the strides of `like`: matrix products round differently under other strides.
    leaves = [
        torch.empty_like(leaf).copy_(tensors["/".join(map(_path_component, place))])
        if isinstance(leaf, Tensor)
        else leaf
        for place, leaf in pairs
    ]
    return pytree.tree_unflatten(leaves, spec)


def open_checkpoint(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read the metadata and the tensors of a file.

    Args:
        path: The file.

    Returns:
        The metadata that `save_checkpoint` wrote, or None if there is none, and the tensors by
        path.

    Raises:
        InvalidInputError: If the file cannot be read, or was written by errata before 0.1.
    """
    try:
        with safe_open(os.fsencode(path).decode(), "pt") as file:
            stored = file.metadata() or {}
            if _OLD_METADATA_KEY in stored:
                raise InvalidInputError(
                    f"{path} was made by errata before 0.1, whose names of weights differ; train "
                    "it "
                    "again."
                )
            metadata = msgspec.json.decode(stored.get(_METADATA_KEY, "null"))
            # Cloned: owned memory, aligned as freshly computed tensors are.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError, UnicodeError) as fault:
        reason = f"{path} must be a state of errata and cannot be read: {fault}."
        raise InvalidInputError(reason) from fault
    if isinstance(metadata, dict) and not is_signed(metadata, tensors):
        raise InvalidInputError(
            f"{path} does not match its digest: it was damaged or changed; train it again, or "
            "fetch it anew."
        )
    return metadata if isinstance(metadata, dict) else None, tensors


def _path_component(key: Any) -> str:
    for what in ("name", "key", "idx"):
        if hasattr(key, what):
            return str(getattr(key, what))
    return str(key)
