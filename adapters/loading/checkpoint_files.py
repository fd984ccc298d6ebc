"""Resolve and check a checkpoint's files before any weight is read."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata.adapters.loading.sources import CheckpointSource, resolve_source
from errata.functional.errors import InvalidInputError, UnsupportedModelError, join_messages

# ---- config and files


def _load_config(source: CheckpointSource) -> Any:
    from transformers import AutoConfig

    from errata.adapters.families import minigpt4_model

    minigpt4_model.register()
    name = source.name
    if "config.json" not in source.files:
        raise InvalidInputError(
            f"model {name!r} must hold config.json, as save_pretrained writes it; it has "
            f"{join_messages(source.files) or 'nothing'}."
        )
    try:
        return AutoConfig.from_pretrained(name, **source.options)
    except OSError as error:
        raise InvalidInputError(
            f"model {name!r} must be a folder, or a hub id in the cache or within reach: {error}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModelError(
            f"the config of {name!r} must be one that the installed transformers knows"
            f"{_instead_of(source)}: {error}"
        ) from error


def checkpoint_folder(
    id_or_path: str, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder that holds a checkpoint's files. A hub id is downloaded if it is not cached.

    Args:
        id_or_path: Folder or hub id.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Whether the hub must not be asked.

    Returns:
        The folder.

    Raises:
        InvalidInputError: If there is no such folder, or the hub cannot be reached.
    """
    source = resolve_source(id_or_path, revision, local_files_only)
    if os.path.isdir(source.name):
        return Path(source.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    patterns += ["*.safetensors"] if source.has_safetensors else ["*.bin"]
    try:
        return Path(
            snapshot_download(
                source.name,
                revision=source.revision,
                allow_patterns=patterns,
                local_files_only=source.local_files_only,
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InvalidInputError(
            f"model {source.name!r} must be a folder, or a hub id in the cache or within reach: "
            f"{error}"
        ) from error


_INSTEAD = {
    "internvl_chat": "OpenGVLab/InternVL3-8B-hf and its siblings (names that end with -hf)",
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "phi3_v": "microsoft/Phi-4-multimodal-instruct",
    "phi4mm": "microsoft/Phi-4-multimodal-instruct at revision refs/pr/70",
    "qwen": "Qwen/Qwen2-VL-7B-Instruct",
    "molmo": "allenai/Molmo2-8B, if the installed transformers has it",
    "florence2": "florence-community/Florence-2-base, which has no decoder-only model either",
    "mplug_owl2": "llava-hf/llava-1.5-7b-hf",
    "cogvlm": "zai-org/GLM-4.1V-9B-Thinking",
    "chatglm": "zai-org/glm-4-9b-hf",
    "minicpmv": "a MiniCPM-V checkpoint of a family that transformers has (minicpmv4_6)",
    "deepseek_vl_v2": "deepseek-community/deepseek-vl-7b-chat",
    "multi_modality": "deepseek-community/deepseek-vl-7b-chat or Janus-Pro-7B",
}
"""Model types that exist as code on the hub only, and what to load in their place."""


def _instead_of(source: CheckpointSource) -> str:
    """What to load in place of a model that brings its own code."""
    try:
        config = _read_json(source, "config.json")
    except (ValueError, RecursionError):
        return ""
    if not isinstance(config, dict):
        return ""
    other = _INSTEAD.get(str(config.get("model_type")))
    if other:
        return f" (code of a checkpoint is never run; take {other})"
    if "auto_map" in config:
        return (
            " (code of a checkpoint is never run: take one in transformers' own format, often "
            "named -hf)"
        )
    return ""


PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_OTHER_STATES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


def _pickle_files(source: CheckpointSource) -> list[str]:
    """Files of weights that torch.load reads: those of save_pretrained, else all of no training."""
    names = [name for name in source.files if name.endswith(PICKLE_SUFFIXES)]
    usual = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    return usual or [name for name in names if not name.startswith(_OTHER_STATES)]


def _check_files(source: CheckpointSource) -> None:
    """Say everything that is wrong with the weights' files of a folder before any is read."""
    from safetensors import SafetensorError, safe_open

    folder = Path(source.name)
    wrong = []
    pickles = [] if source.has_safetensors else _pickle_files(source)
    kind = "model.safetensors" if source.has_safetensors or not pickles else "pytorch_model.bin"
    files = sorted(folder.glob("*.safetensors")) or [folder / name for name in pickles]
    index = folder / f"{kind}.index.json"
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
        other = [name for name in source.files if name.endswith((".h5", ".msgpack", ".gguf"))]
        raise InvalidInputError(
            f"model folder {os.fspath(folder)!r} must hold *.safetensors (or *.bin, *.pt), and has "
            f"{', '.join(other[:4]) or 'no weights'}: save the model again with save_pretrained."
        )
    for file in files:
        if file.suffix != ".safetensors":
            continue  # torch.load says it
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


def load_pickles(source: CheckpointSource) -> dict[str, Any]:
    """The weights of a checkpoint's `*.bin`, `*.pt` and `*.pth` files.

    Only tensors are unpickled (`torch.load(weights_only=True)`), mapped where the file allows.

    Args:
        source: The checkpoint.

    Returns:
        Tensors by name.

    Raises:
        InvalidInputError: If there is no such file, one holds anything else, or two the same name.
    """
    import pickle

    import torch
    from torch import Tensor

    tensors: dict[str, Any] = {}
    names = _pickle_files(source)
    if not names:
        raise InvalidInputError(f"{source.name!r} must hold *.bin, *.pt or *.pth, and has none.")
    for name in names:
        path = _find_file(source, name)
        try:
            # the format before torch 1.6 is no zip file, and cannot be mapped
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0][:300]
            raise InvalidInputError(
                f"{name} must be a PyTorch file of tensors alone, and cannot be read: {reason}"
            ) from error
        for part in ("state_dict", "model", "module"):
            if isinstance(state, dict) and isinstance(state.get(part), dict):
                state = state[part]
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise InvalidInputError(
                f"{name} must hold tensors by name (a state dict), and holds something else."
            )
        twice = sorted(tensors.keys() & state.keys())
        if twice:
            raise InvalidInputError(
                f"{name} and another file of {source.name!r} both hold {join_messages(twice)}: "
                "leave one of them."
            )
        tensors |= state
    return tensors


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


def _find_file(source: CheckpointSource, file: str) -> str:
    """Where a checkpoint's file is on this disk; empty where it has none."""
    from transformers.utils.hub import cached_file

    if source.files and file not in source.files:
        return ""
    path = cached_file(
        source.name,
        file,
        revision=source.revision,
        local_files_only=source.local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path or ""


def _read_json(source: CheckpointSource, file: str) -> dict[str, Any]:
    path = _find_file(source, file)
    return json.loads(Path(path).read_text("utf-8")) if path else {}
