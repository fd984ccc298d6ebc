"""`Patch`: what an entry of a delta does to a model. Kinds make it, `bind` carries it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from errata.functional.header import Header
from errata.functional.types import Batch, Hook, Hooks, Model

__all__ = ["ApplyEntry", "Decision", "Patch", "RoutedHook"]

Decision = Mapping[str, Tensor]
"""What a routed hook decides for the rows of a batch: tensors [B ...] by name."""


class RoutedHook(NamedTuple):
    """A hook that decides once per row, at the end of the prompt, and applies the decision.

    Both are pure functions. `binding/edited_forward.py` carries the decision in the batch and in
    the key-value cache, so the tokens generated after the prompt use the same one.

    Attributes:
        decide: (batch, input, output) -> decision. Called only if `batch` carries none yet.
        apply: (batch, input, output, decision) -> new output.
    """

    decide: Callable[[Batch, Tensor, Tensor], Decision]
    apply: Callable[[Batch, Tensor, Tensor, Decision], Tensor]


class Patch(NamedTuple):
    """What an entry of a delta does to a model.

    Attributes:
        params: Parameters that replace the base's.
        hooks: (batch) -> hooks in the decoder, for the batch it is about to run.
            `batch.edit_index` says which edit of a stacked delta each row runs under.
        routed_hooks: Module path to a hook that decides once per row.
        embed_hooks: Hooks before the decoder.
        per_edit: Whether a stacked change can only be run edit by edit.
        wrap: Any other change of the model.
    """

    params: Mapping[str, Tensor] = {}
    hooks: Callable[[Batch], Hooks] | None = None
    routed_hooks: Mapping[str, RoutedHook] = {}
    embed_hooks: Hooks = {}
    per_edit: bool = False
    wrap: Callable[[Model], Model] | None = None


ApplyEntry = Callable[[Model, Header, Any, Mapping[str, Tensor]], Patch]
"""(model as bound so far, header, entry, the entry's tensors) -> what the entry does."""


def _make_hooks(makers: Mapping[str, Callable[[Batch], Hook]], batch: Batch) -> Hooks:
    return {path: make(batch) for path, make in makers.items()}
