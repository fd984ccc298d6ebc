"""What an entry of a delta does to a model: kinds give this value, `bind` carries it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from errata.functional.header import Header
from errata.functional.types import Batch, Hook, Hooks, Model

__all__ = ["ApplyEntry", "Patch"]


class Patch(NamedTuple):
    """What an entry of a delta does to a model.

    `rewrites(batch)` are for the decoder, given the batch it is about to run: `batch.edit` says
    which edit of a stacked delta each row runs under, and `batch.notes` is a dict of this run's own
    in which a rewrite may leave what later tokens need (`[B ...]`, under a name that starts with
    the entry's). `below` are for what runs before the decoder.
    `apart`: this stacked change can only be run edit by edit. `wrap` does anything else.
    """

    params: Mapping[str, Tensor] = {}
    hooks: Callable[[Batch], Hooks] | None = None
    embed_hooks: Hooks = {}
    per_edit: bool = False
    wrap: Callable[[Model], Model] | None = None


ApplyEntry = Callable[[Model, Header, Any, Mapping[str, Tensor]], Patch]
"""(model as bound so far, header, entry, the entry's tensors) -> what the entry does."""


# Rewrites.


def _make_hooks(makers: Mapping[str, Callable[[Batch], Hook]], batch: Batch) -> Hooks:
    return {path: make(batch) for path, make in makers.items()}
