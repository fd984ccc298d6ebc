"""What a delta writes down about itself: the base it was made for and the edits it holds.

Contents are hashed, never stored, so that a delta can be shipped without the data behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from .card import Base
from .fingerprint import fingerprint
from .header import EditRecord, Entry, Form, Header
from .types import Image, Model, Query

__all__ = ["base_of", "header_for", "image_key", "record"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def image_key(image: Image) -> str:
    """Name an image by its content: its own `.key`, else sha256 of the file or of the pixels."""
    key = getattr(image, "key", None)
    if isinstance(key, str):
        return key
    if isinstance(image, str | Path):
        with open(image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    head = f"{image.mode} {image.size[0]}x{image.size[1]} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def record(query: Query) -> EditRecord:
    """The record of one edit; its id is a hash of prompt, target and images together.

    >>> record(Query("who is it?", "bo")).id
    '1d2a4c2b3b1d'
    """
    images = tuple(image_key(image) for image in query.images)
    whole = "\x1f".join((query.prompt, query.target, *images))
    return EditRecord(
        id=_sha256(whole)[:12],
        prompt=_sha256(query.prompt),
        target=_sha256(query.target),
        images=images,
    )


def base_of(model: Model, names: Iterable[str]) -> Base:
    """The identity of a model, with a fingerprint of each parameter named."""
    card = model.card
    return Base(
        id=card.id,
        revision=card.revision,
        family=card.family,
        config=card.config,
        touched={name: fingerprint(model.params[name]) for name in sorted(set(names))},
    )


def header_for(
    model: Model,
    editor: str,
    settings: Any,
    entries: tuple[Entry, ...],
    queries: Sequence[Query],
    *,
    earlier: tuple[EditRecord, ...] = (),
    form: Form = "act",
    stack: int = 0,
    recursive: bool = False,
) -> Header:
    """The header of a delta that holds `earlier` edits and then `queries`."""
    return Header(
        editor=editor,
        settings=msgspec.json.decode(msgspec.json.encode(settings)),  # lists as a file has them
        base=base_of(model, (entry.name for entry in entries)),
        form=form,
        entries=entries,
        edits=earlier + tuple(record(query) for query in queries),
        stack=stack,
        recursive=recursive,
    )
