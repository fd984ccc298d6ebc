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
from errata.functional.atomic import whole_file
from errata.functional.errors import BadInput, listed

__all__ = ["FOLDER", "keep", "named", "opened", "recall", "shipped"]

FOLDER = Path(__file__).parent / "states"
_KEY = "errata.state"


def shipped(editor: str, model: Model) -> Path:
    """The trained state that comes with the package for this editor and model.

    Raises BadInput, naming those that there are.
    """
    owner, _, name = model.card.id.rpartition("/")
    path = FOLDER / f"{editor}-{name}.safetensors"
    if owner != "micro" or not path.is_file():
        there = sorted(found.stem for found in FOLDER.glob("*.safetensors"))
        raise BadInput(
            f"a trained {editor} is shipped for {', '.join(there) or 'no model'}, not for "
            f"{model.card.id}: train one (`python -m errata.bench.fit`) and name its file."
        )
    return path


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a pytree by their path: fields, keys and numbers joined by slashes.

    >>> named({"a": (torch.ones(1),)})
    {'a/0': tensor([1.])}
    """
    pairs = pytree.tree_flatten_with_path(tree)[0]
    return {"/".join(map(_word, path)): leaf for path, leaf in pairs if isinstance(leaf, Tensor)}


def keep(
    path: str | Path, tree: Any, about: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write the tensors of a pytree, whole or not at all; floats of 32 bits in `dtype` if given."""
    tensors = {
        name: tensor.detach().to(dtype if dtype and tensor.dtype == torch.float32 else tensor.dtype)
        .contiguous().clone()
        for name, tensor in named(tree).items()
    }  # fmt: skip
    data = save(tensors, {_KEY: msgspec.json.encode(dict(about), order="sorted").decode()})
    with whole_file(path) as file:
        file.write(data)


def recall(path: str | Path, like: Any, about: Mapping[str, Any]) -> Any:
    """Read a pytree shaped and typed as `like` back.

    Raises BadInput, listing every difference, unless the file's `about` says the same as `about`
    and its tensors are those of `like`.
    """
    said, tensors = opened(path)
    want = msgspec.json.decode(msgspec.json.encode(dict(about)))
    faults = []
    if said is None:
        faults.append(f"it has no {_KEY} line")
    else:
        faults += [
            f"{key} is {said.get(key)!r}, must be {value!r}"
            for key, value in want.items() if said.get(key) != value
        ]  # fmt: skip
    mine = named(like)
    faults += [f"{name} is missing" for name in sorted(set(mine) - set(tensors))]
    faults += [f"{name} is not known" for name in sorted(set(tensors) - set(mine))]
    faults += [
        f"{name} is {list(tensors[name].shape)}, must be {list(mine[name].shape)}"
        for name in sorted(set(mine) & set(tensors)) if tensors[name].shape != mine[name].shape
    ]  # fmt: skip
    if faults:
        raise BadInput(f"{path} must fit what it is read for: {listed(faults)}.")
    pairs, spec = pytree.tree_flatten_with_path(like)
    leaves = [
        tensors["/".join(map(_word, place))].to(leaf) if isinstance(leaf, Tensor) else leaf
        for place, leaf in pairs
    ]
    return pytree.tree_unflatten(leaves, spec)


def opened(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What a file says about itself, and its tensors by name. Raises BadInput where it can not."""
    try:
        with safe_open(path, "pt") as file:
            said = msgspec.json.decode((file.metadata() or {}).get(_KEY, "null"))
            # cloned: memory of one's own, aligned as if it had just been computed
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError) as fault:
        reason = f"{path} must be a state of errata and can not be read: {fault}."
        raise BadInput(reason) from fault
    return said if isinstance(said, dict) else None, tensors


def _word(key: Any) -> str:
    for what in ("name", "key", "idx"):
        if hasattr(key, what):
            return str(getattr(key, what))
    return str(key)
