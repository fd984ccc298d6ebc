"""Write a checkpoint whose weights are pickles anew, as safetensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from errata.adapters.loading.checkpoint_files import load_pickles
from errata.adapters.loading.sources import resolve_source
from errata.functional.errors import InvalidInputError
from errata.functional.files import atomic_folder

__all__ = ["convert_checkpoint"]

OTHER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md")


def convert_checkpoint(
    folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the weights of `*.bin`, `*.pt` or `*.pth` files as safetensors, into a new folder.

    Tensors keep their names, dtypes and values; one that several names share is stored once.
    Configs and tokenizers are copied, code is not. The files are mapped, one shard is in memory.

    Args:
        folder: The checkpoint.
        output_dir: Folder to write; must not exist and must be outside `folder`.
        max_shard_size: Largest shard, such as "5GB".

    Returns:
        `output_dir` as a path.

    Raises:
        InvalidInputError: If `folder` has no such files or safetensors already, or a file does
            not hold tensors alone; if `output_dir` exists or cannot be written. Then nothing is.
    """
    from huggingface_hub import save_torch_state_dict

    base, target = Path(folder), Path(output_dir)
    if not base.is_dir():
        raise InvalidInputError(f"{os.fspath(folder)!r} must be the folder of a checkpoint.")
    if base.resolve() in (target.resolve(), *target.resolve().parents):
        raise InvalidInputError(
            f"{target} must lie outside the checkpoint it is made from, {base}."
        )
    source = resolve_source(base)
    if source.has_safetensors:
        raise InvalidInputError(f"{base} holds safetensors already: there is nothing to convert.")
    tensors = load_pickles(source)
    with atomic_folder(target) as temporary:
        for name in source.files:
            is_copied = name.endswith(OTHER_SUFFIXES) and not name.endswith(".index.json")
            if is_copied and (base / name).is_file():
                shutil.copyfile(base / name, temporary / name)
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size)
    return target
