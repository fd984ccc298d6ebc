"""Sentence encoders for retrieval by meaning: `sentence:NAME`.

A delta file holds the name of an encoder, never where it is. Only places that the caller has named
are loaded: an absolute folder in an editor's settings, a folder or hub id given to
`register_encoder_path`, or `from_pretrained(encoders={name: place})`. No code of a checkpoint is
run. Loaded on first use: by sentence-transformers where it is installed, else by transformers with
a mean over the tokens, which is what most of its models do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from os.path import isabs
from pathlib import Path
from types import MappingProxyType

from errata.functional.errors import InvalidSettingsError

__all__ = ["load_sentence_encoder", "register_encoder_path"]

BATCH_SIZE = 64  # texts at once

_ENCODER_PATHS: dict[str, str] = {}


def register_encoder_path(name: str, place: str | Path) -> None:
    """Say where an encoder is; delta files hold names, not places.

    >>> register_encoder_path("all-MiniLM-L6-v2", "/models/all-MiniLM-L6-v2")

    Args:
        name: Name of the encoder, as in `sentence:NAME`.
        place: Its folder, or a hub id, which may be downloaded.
    """
    _ENCODER_PATHS[name] = str(place)


def load_sentence_encoder(
    name: str, places: Mapping[str, str | Path] = MappingProxyType({})
) -> Callable[[Sequence[str]], object]:
    """Load a sentence encoder, which embeds texts as unit keys.

    Args:
        name: Name of the encoder, or its absolute folder.
        places: Folder or hub id by name, before those of `register_encoder_path`.

    Returns:
        Function from B texts to [B d].

    Raises:
        InvalidSettingsError: If nobody has said where it is, or it cannot be loaded.
    """
    place = str(places.get(name) or _ENCODER_PATHS.get(name) or (name if isabs(name) else ""))
    if not place:
        raise InvalidSettingsError(
            f"encoder 'sentence:{name}' must have a place, and none is named: call "
            f"adapters.register_encoder_path({name!r}, FOLDER), or load the model with "
            f"encoders={{{name!r}: FOLDER}}."
        )
    return _load(name, place)


@functools.lru_cache(maxsize=4)
def _load(name: str, place: str) -> Callable[[Sequence[str]], object]:
    try:
        return _load_with_library(place) or _load_with_transformers(place)
    except Exception as error:  # a hub has many ways to say no
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InvalidSettingsError(
            f"encoder 'sentence:{name}' must be a sentence-transformers model that can be loaded, "
            f"and is not ({reason}): name its folder by adapters.register_encoder_path, or use "
            "'hashed' or 'base'."
        ) from error


def _load_with_library(path: str) -> Callable[[Sequence[str]], object] | None:
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError:
        return None
    model = SentenceTransformer(
        path, device="cpu", trust_remote_code=False, local_files_only=Path(path).is_dir()
    )
    return lambda texts: model.encode(
        list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    ).float()


def _load_with_transformers(path: str) -> Callable[[Sequence[str]], object]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": Path(path).is_dir()}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    model = AutoModel.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, **options
    ).eval()

    def encode(texts: Sequence[str]) -> object:
        batches = []
        with torch.no_grad():
            for begin in range(0, len(texts), BATCH_SIZE):
                tokenized = tokenizer(
                    list(texts[begin : begin + BATCH_SIZE]),
                    padding=True,
                    truncation=True,
                    max_length=min(tokenizer.model_max_length, 512),
                    return_tensors="pt",
                )
                hidden_states = model(**tokenized).last_hidden_state.float()  # [b L d]
                attention_mask = tokenized["attention_mask"][..., None].float()
                mean = (hidden_states * attention_mask).sum(1) / attention_mask.sum(1).clamp_min(1)
                batches.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(batches)

    return encode
