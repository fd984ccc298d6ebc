"""Resolve and check a checkpoint's files before any weight is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata.functional.errors import InvalidInputError, UnsupportedModelError, join_messages

# ---- config and files


def _load_config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    from errata.adapters.families import minigpt4_model

    minigpt4_model.register()
    local = os.path.isdir(name)
    if not local:
        _refuse_no_id(name)
    if local and not os.path.isfile(os.path.join(name, "config.json")):
        raise InvalidInputError(
            f"model folder {name!r} must hold config.json, as save_pretrained writes it; it has "
            f"{join_messages(sorted(os.listdir(name))) or 'nothing'}."
        )
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise InvalidInputError(
            f"model {name!r} must be a folder, or a hub id in the cache or within reach: {error}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModelError(
            f"the config of {name!r} must be one that the installed transformers knows: {error}"
        ) from error


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder that holds a checkpoint's files. A hub id is downloaded if it is not cached.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The folder.

    Raises:
        InvalidInputError: If there is no such folder, or the hub cannot be reached.
    """
    if os.path.isdir(name):
        return Path(name)
    _refuse_no_id(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InvalidInputError(
            f"model {name!r} must be a folder, or a hub id in the cache or within reach: {error}"
        ) from error


def _refuse_no_id(name: str) -> None:
    """Refuse what is neither a folder nor can be a hub id."""
    if os.path.exists(name) or name.startswith((".", "/", "~")) or os.sep * 2 in name:
        problem = "a file" if os.path.exists(name) else "not there"
        raise InvalidInputError(f"model {name!r} must be a folder or a hub id, and is {problem}.")


def _find_commit(name: str, revision: str | None) -> str:
    """The commit of a hub snapshot, from the cache's own layout; empty for a plain folder."""
    if os.path.isdir(name):
        return ""
    match = re.search(
        r"[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]", _find_file(name, "config.json", revision)
    )
    return match.group(1) if match else ""


def _check_files(folder: Path) -> None:
    """Say everything that is wrong with the weights' files before any weight is read."""
    from safetensors import SafetensorError, safe_open

    wrong = []
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            indexed_files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InvalidInputError(
                f"{index} must map weights to files, and cannot be read: {error}"
            ) from error
        missing = sorted(indexed_files - {file.name for file in files})
        wrong += [f"{name} is named in the index and not there" for name in missing]
        files = [file for file in files if file.name in indexed_files]
    if not files and not wrong:
        other = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".h5")
        )
        raise InvalidInputError(
            f"model folder {os.fspath(folder)!r} must hold *.safetensors, and has "
            f"{', '.join(other[:4]) or 'no weights'}: save the model again with save_pretrained."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            wrong.append(f"{file.name} is truncated or no safetensors file ({error})")
    if wrong:
        raise InvalidInputError(
            f"the weights in {os.fspath(folder)!r} must be whole: {join_messages(wrong)}. Fetch "
            "them anew."
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no table of missing keys: what is wrong is raised."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _find_file(name: str, file: str, revision: str | None) -> str:
    """Where a checkpoint's file is on this disk; empty where it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path or ""


def _read_json(name: str, file: str, revision: str | None) -> dict[str, Any]:
    path = _find_file(name, file, revision)
    return json.loads(Path(path).read_text("utf-8")) if path else {}
