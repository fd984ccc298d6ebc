"""What every editor checks: its queries, its training, its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from errata.functional import Delta, Editor, Model, Query
from errata.functional.errors import (
    EditDivergedError,
    InvalidInputError,
    InvalidSettingsError,
    join_messages,
    lone_surrogate,
)
from errata.functional.types import State

__all__ = ["guarded"]


def guarded(editor: Editor) -> Editor:
    """Check the queries before an edit, compute it without autocast, check the delta after it.

    Args:
        editor: The editor.

    Returns:
        An editor of the same name and settings. It raises `InvalidInputError` for queries that
        cannot be edits, `InvalidSettingsError` for an editor that was not trained, and
        `EditDivergedError` for a delta that is not finite.

    Raises:
        InvalidSettingsError: If a setting has a value that it cannot have.
    """

    _require_valid_settings(editor)

    def init(model: Model, generator: torch.Generator) -> State:
        with _without_autocast(model):
            return editor.init(model, generator)

    def edit(model: Model, state: State, queries: Sequence[Query]) -> tuple[Delta, State]:
        checked = _checked_queries(queries)
        _require_training(editor, state)
        try:
            with _without_autocast(model):
                delta, next_state = editor.edit(model, state, checked)
        except EditDivergedError as error:  # a batch edit diverges as a whole
            raise EditDivergedError(editor.name, range(len(checked)), len(checked)) from error
        _require_finite(editor.name, delta, len(checked))
        return delta, next_state

    def edit_each(model: Model, state: State, queries: Sequence[Query]) -> Delta:
        checked = _checked_queries(queries)
        _require_training(editor, state)
        try:
            with _without_autocast(model):
                delta = editor.edit_each(model, state, checked)
        except EditDivergedError as error:
            raise EditDivergedError(editor.name, error.edits, len(checked)) from error
        _require_finite(editor.name, delta, len(checked))
        return delta

    return editor._replace(init=init, edit=edit, edit_each=edit_each)


def _require_valid_settings(editor: Editor) -> None:
    """Check settings that were made by hand, without `configure`; numbers must be finite."""
    plain = msgspec.to_builtins(editor.config)
    wrong = [
        f"{name} must be finite, got {value}"
        for name, value in plain.items()
        if any(isinstance(x, float) and not math.isfinite(x) for x in _numbers(value))
    ]
    try:
        msgspec.convert(plain, type(editor.config))
    except msgspec.ValidationError as error:
        wrong.append(str(error).replace("`", ""))
    if wrong:
        raise InvalidSettingsError(f"{editor.name}: {join_messages(wrong)}.")


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _checked_queries(queries: Any) -> list[Query]:
    if isinstance(queries, Query):
        queries = [queries]
    if isinstance(queries, str) or not isinstance(queries, Sequence):
        raise InvalidInputError(
            f"edits must be a list of Query(prompt, target, images), got a "
            f"{type(queries).__name__}."
        )
    if not queries:
        raise InvalidInputError("an edit needs at least one query, got none.")
    wrong = [
        f"query {number + 1}: {reason}"
        for number, query in enumerate(queries)
        if (reason := _query_fault(query))
    ]
    if wrong:
        raise InvalidInputError(f"{join_messages(wrong)}.")
    return list(queries)


def _query_fault(query: Any) -> str:
    if not isinstance(query, Query):
        return f"it must be a Query(prompt, target, images), and is a {type(query).__name__}"
    if not isinstance(query.prompt, str) or not isinstance(query.target, str):
        kinds = f"{type(query.prompt).__name__} and {type(query.target).__name__}"
        return f"prompt and target must be text, got {kinds}"
    if not query.target.strip():
        return f"the target must hold more than white space, got {query.target[:20]!r}"
    return lone_surrogate(query.prompt) or lone_surrogate(query.target)


def _require_training(editor: Editor, state: State) -> None:
    may_be_untrained = getattr(editor.config, "untrained", True)
    if not (may_be_untrained or getattr(state, "is_trained", True)):
        raise InvalidSettingsError(
            f"{editor.name} must be trained before it edits, and this state holds random weights: "
            "train it (`errata train`) and name its file in `weights`, or "
            "take untrained=True to edit with random weights."
        )


def _without_autocast(model: Model) -> torch.autocast:
    device = next(iter(model.params.values())).device
    return torch.autocast(device_type=device.type, enabled=False)


def _require_finite(name: str, delta: Delta, num_queries: int) -> None:
    """Find the edits whose tensors are not finite. Costs one pass over the delta."""
    shared = frozenset().union(*(entry.shared_tensors() for entry in delta.header.entries))
    diverged: set[int] = set()
    for key, tensor in delta.tensors.items():
        if not tensor.dtype.is_floating_point or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)  # NaN if there is one
        if bool(torch.isfinite(low) & torch.isfinite(high)):
            continue
        if delta.header.stack and key not in shared:
            bad = ~torch.isfinite(tensor).flatten(1).all(1)
            diverged |= set(bad.nonzero()[:, 0].tolist())
        else:
            diverged |= set(range(num_queries))
    if diverged:
        raise EditDivergedError(name, sorted(diverged), num_queries)
