"""Sentence encoders for retrieval by meaning: `sentence:NAME`, a hub id or a folder.

Loaded on first use: by sentence-transformers where it is installed, else by transformers with a
mean over the tokens, which is what most of its models do. An id without a slash is looked up under
`sentence-transformers/`, as that library does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from errata.functional import encoders
from errata.functional.errors import BadSettings

__all__ = ["place", "sentence"]

TOGETHER = 64  # texts at once

_PLACES: dict[str, str] = {}


def place(name: str, folder: str | Path) -> None:
    """Say where on this machine the encoder of that name lies: delta files hold names, no paths.

    >>> place("all-MiniLM-L6-v2", "/models/all-MiniLM-L6-v2")
    """
    _PLACES[name] = str(folder)
    sentence.cache_clear()


@functools.lru_cache(maxsize=4)
def sentence(name: str) -> Callable[[Sequence[str]], object]:
    """Texts to unit keys [B d] by a sentence encoder.

    Raises BadSettings when it can not be loaded.
    """
    where = _PLACES.get(name, name)
    if not Path(where).is_dir() and "/" not in where:
        where = f"sentence-transformers/{where}"
    try:
        return _library(where) or _plain(where)
    except Exception as error:  # a hub has many ways to say no
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadSettings(
            f"encoder 'sentence:{name}' must be a sentence-transformers model that can be loaded, "
            f"and is not ({reason}): give a folder, name one by adapters.sentences.place, or use "
            "'hashed' or 'base'."
        ) from error


def _library(where: str) -> Callable[[Sequence[str]], object] | None:
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError:
        return None
    model = SentenceTransformer(where, device="cpu")
    return lambda texts: model.encode(
        list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    ).float()


def _plain(where: str) -> Callable[[Sequence[str]], object]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModel.from_pretrained(where, dtype=torch.float32).eval()

    def encode(texts: Sequence[str]) -> object:
        parts = []
        with torch.no_grad():
            for begin in range(0, len(texts), TOGETHER):
                coded = tokenizer(
                    list(texts[begin : begin + TOGETHER]), padding=True, truncation=True,
                    max_length=min(tokenizer.model_max_length, 512), return_tensors="pt",
                )  # fmt: skip
                rows = model(**coded).last_hidden_state.float()  # [b L d]
                keep = coded["attention_mask"][..., None].float()
                mean = (rows * keep).sum(1) / keep.sum(1).clamp_min(1)
                parts.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(parts)

    return encode


encoders.enrol("sentence", sentence)  # type: ignore[arg-type]
