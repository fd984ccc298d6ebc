"""What a delta writes down about itself: the base it was made for and the edits it holds.

Contents are hashed, never stored, so that a delta can be shipped without the data behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from errata.functional.card import BaseModel
from errata.functional.hashing import content_id, hash_parameter
from errata.functional.header import Arithmetic, EditRecord, Entry, Header
from errata.functional.queries import Query
from errata.functional.types import Model

__all__ = ["base_identity", "edit_record", "make_header"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def edit_record(query: Query) -> EditRecord:
    """The record of one edit; its id is a hash of prompt, target and images together.

    >>> edit_record(Query("who is it?", "bo")).id
    'c7aff5393784'
    """
    images = tuple(content_id(image) for image in query.images)
    text = "\x1f".join((query.prompt, query.target, *images))
    return EditRecord(
        id=_sha256(text)[:12],
        prompt=_sha256(query.prompt),
        target=_sha256(query.target),
        images=images,
    )


def base_identity(model: Model, names: Iterable[str]) -> BaseModel:
    """The identity of a model, with a fingerprint of each parameter named."""
    card = model.card
    return BaseModel(
        id=card.id,
        revision=card.revision,
        family=card.family,
        config_hash=card.config_hash,
        parameter_hashes={name: hash_parameter(model.params[name]) for name in sorted(set(names))},
    )


def make_header(
    model: Model,
    editor: str,
    settings: Any,
    entries: tuple[Entry, ...],
    queries: Sequence[Query],
    *,
    earlier_edits: tuple[EditRecord, ...] = (),
    arithmetic: Arithmetic = "act",
    stack: int = 0,
    order_dependent: bool = False,
) -> Header:
    """The header of a delta that holds `earlier` edits and then `queries`."""
    return Header(
        editor=editor,
        settings=msgspec.json.decode(msgspec.json.encode(settings)),  # lists as a file has them
        base=base_identity(model, (entry.name for entry in entries)),
        arithmetic=arithmetic,
        entries=entries,
        edits=earlier_edits + tuple(edit_record(query) for query in queries),
        stack=stack,
        order_dependent=order_dependent,
    )
