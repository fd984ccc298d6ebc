"""Sentence encoders for retrieval by meaning: `sentence:NAME`, a hub id or a folder.

Loaded on first use: by sentence-transformers where it is installed, else by transformers with a
mean over the tokens, which is what most of its models do. An id without a slash is looked up under
`sentence-transformers/`, as that library does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from errata.functional.errors import InvalidSettingsError

__all__ = ["load_sentence_encoder", "register_encoder_path"]

BATCH_SIZE = 64  # texts at once

_ENCODER_PATHS: dict[str, str] = {}


def register_encoder_path(name: str, folder: str | Path) -> None:
    """Say where on this machine an encoder is; delta files hold names, not paths.

    >>> register_encoder_path("all-MiniLM-L6-v2", "/models/all-MiniLM-L6-v2")

    Args:
        name: Name of the encoder.
        folder: Its folder.
    """
    _ENCODER_PATHS[name] = str(folder)
    load_sentence_encoder.cache_clear()


@functools.lru_cache(maxsize=4)
def load_sentence_encoder(name: str) -> Callable[[Sequence[str]], object]:
    """Load a sentence encoder, which embeds texts as unit keys.

    Args:
        name: Name of the encoder, or its folder.

    Returns:
        Function from B texts to [B d].

    Raises:
        InvalidSettingsError: If it cannot be loaded.
    """
    path = _ENCODER_PATHS.get(name, name)
    if not Path(path).is_dir() and "/" not in path:
        path = f"sentence-transformers/{path}"
    try:
        return _load_with_library(path) or _load_with_transformers(path)
    except Exception as error:  # a hub has many ways to say no
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InvalidSettingsError(
            f"encoder 'sentence:{name}' must be a sentence-transformers model that can be loaded, "
            f"and is not ({reason}): give a folder, name one by adapters.register_encoder_path, "
            "or use "
            "'hashed' or 'base'."
        ) from error


def _load_with_library(path: str) -> Callable[[Sequence[str]], object] | None:
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError:
        return None
    model = SentenceTransformer(path, device="cpu")
    return lambda texts: model.encode(
        list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    ).float()


def _load_with_transformers(path: str) -> Callable[[Sequence[str]], object]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()

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
