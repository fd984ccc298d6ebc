"""What a delta records: the base it was made for and its edits.

Prompts, targets and images are hashed, never stored, so that a delta can be published without its
data. `bind` compares the base with its model: `functional/binding/bound_model.py`.
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
    """Make the record of one edit; its id is a hash of prompt, target and images.

    Args:
        query: The edit.

    Returns:
        The record.

    Example:
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
    """Return the identity of a model, with a hash of each named parameter.

    Args:
        model: The model.
        names: Names of parameters.

    Returns:
        The identity.
    """
    card = model.card
    return BaseModel(
        id=card.id,
        revision=card.revision,
        family=card.family,
        config_hash=card.config_hash,
        parameter_hashes={
            name: hash_parameter(model.params[card.canonical_name(name)])
            for name in sorted(set(names))
        },
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
    replaced_edits: Sequence[Sequence[int]] = (),
) -> Header:
    """Make the header of a delta.

    Args:
        model: The model that is edited.
        editor: Name of the method.
        settings: Settings of the method, encodable as JSON.
        entries: The entries of the delta.
        queries: The new edits.
        earlier_edits: Records of the edits before them. Each edit of a stacked delta holds these.
        arithmetic: How low-rank entries are computed.
        stack: Number of edits of a stacked delta, 0 for a plain one.
        order_dependent: Whether each edit was computed on top of those before it.
        replaced_edits: In a stacked delta, the earlier edits that each edit replaces, by index.

    Returns:
        The header. Its edits are `earlier_edits`, then `queries`; in a stacked delta `queries`.
    """
    records = tuple(edit_record(query) for query in queries)
    replaced = tuple(tuple(numbers) for numbers in replaced_edits)
    return Header(
        editor=editor,
        settings=msgspec.json.decode(msgspec.json.encode(settings)),  # tuples become lists
        base=base_identity(model, (entry.name for entry in entries)),
        arithmetic=arithmetic,
        entries=entries,
        edits=records if stack else earlier_edits + records,
        shared_edits=earlier_edits if stack else (),
        replaced_edits=replaced if any(replaced) else (),
        stack=stack,
        order_dependent=order_dependent,
    )
