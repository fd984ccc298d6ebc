"""The functions of a bound model: the base's with a delta's hooks, each row under its edit.

A stacked change that no hook can express runs edit by edit: the rows of each edit go through the
model bound to that edit alone. That reads the edit numbers, so it does not work under `vmap`. The
caller's hooks then run once per edit, on its rows only, edits in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional.errors import InvalidInputError
from errata.functional.forward.batches import concat_batches, take_rows
from errata.functional.forward.hooks import compose_hooks
from errata.functional.kinds.common.patch import RoutedHook
from errata.functional.types import Batch, Hooks, Inputs, KVCache, Model, Params

__all__ = ["HookPlan", "edited_functions"]


NO_HOOKS: Hooks = MappingProxyType({})


class HookPlan(NamedTuple):
    """How a delta acts on the functions of a model.

    Attributes:
        hooks: What the entries do in the decoder, in their order: a function of the batch, or a
            pair of a name and a table of routed hooks. Their decisions are stored under the name.
        embed_hooks: Hooks before the decoder.
        per_edit: Whether to decode edit by edit.
        embed_per_edit: Whether to embed edit by edit.
        embed_next_per_edit: Whether to embed new tokens edit by edit.
        bind_one: (params, edit) -> the model bound to that edit alone.
    """

    hooks: Sequence[Callable[[Batch], Hooks] | tuple[str, Mapping[str, RoutedHook]]] = ()
    embed_hooks: Hooks = {}
    per_edit: bool = False
    embed_per_edit: bool = False
    embed_next_per_edit: bool = False
    bind_one: Callable[[Params, int], Model] | None = None


def edited_functions(model: Model, plan: HookPlan) -> dict[str, Any]:
    """Make embed, decode, select_scored and embed_next of `model` under a plan.

    Args:
        model: The model before the delta.
        plan: What the delta does.

    Returns:
        The functions by the field of `Model` they replace.
    """

    def hooks_for(batch: Batch, extra_hooks: Hooks, decisions: MutableMapping) -> Hooks:
        layers = [
            make(batch) if callable(make) else _routed_hooks(*make, batch, decisions)
            for make in plan.hooks
        ]
        return compose_hooks(*layers, extra_hooks)

    def embed(
        params: Params, inputs: Inputs, hooks: Hooks = NO_HOOKS, edit_index: Tensor | None = None
    ):
        if plan.embed_per_edit:
            return _embed_per_edit(model, plan, params, inputs, hooks, edit_index)
        return model.embed(
            params, inputs, compose_hooks(plan.embed_hooks, hooks), edit_index=edit_index
        )

    def decode(params: Params, batch: Batch, hooks: Hooks = NO_HOOKS, **options):
        if plan.per_edit:

            def run(bound: Model, edit_batch: Batch, rows: Tensor):
                return bound.decode(bound.params, edit_batch, hooks, **_option_rows(options, rows))

            return _run_per_edit(model, plan, params, batch, run)
        decisions: dict[str, Tensor] = {}
        result = model.decode(params, batch, hooks_for(batch, hooks, decisions), **options)
        return _with_routing(result, decisions)

    def select_scored(params: Params, batch: Batch, hooks: Hooks = NO_HOOKS, **options):
        if plan.per_edit:

            def run(bound: Model, edit_batch: Batch, rows: Tensor):
                return bound.select_scored(
                    bound.params, edit_batch, hooks, **_option_rows(options, rows)
                )

            selected = _run_per_edit(model, plan, params, batch, run, same_layout=True)
            return batch if selected is None else selected
        decisions: dict[str, Tensor] = {}
        result = model.select_scored(params, batch, hooks_for(batch, hooks, decisions), **options)
        return _with_routing(result, decisions)

    def embed_next(
        params: Params,
        input_ids: Tensor,
        kv_cache: KVCache,
        hooks: Hooks = NO_HOOKS,
        edit_index: Tensor | None = None,
    ):
        if not plan.embed_next_per_edit:
            return model.embed_next(params, input_ids, kv_cache, hooks, edit_index=edit_index)
        edit_index = _require_edit_index(edit_index)
        groups, parts = _rows_by_edit(edit_index), []
        for number, rows in groups:
            bound, edit_cache = (
                _model_of_edit(model, plan, params, number),
                _cache_rows(kv_cache, rows),
            )
            parts.append(
                bound.embed_next(
                    bound.params, input_ids[rows], edit_cache, hooks, edit_index=edit_index[rows]
                )
            )
        return _merge_groups(parts, groups)

    return {
        "embed": embed,
        "decode": decode,
        "select_scored": select_scored,
        "embed_next": embed_next,
    }


def _routed_hooks(
    name: str,
    hooks: Mapping[str, RoutedHook],
    batch: Batch,
    decisions: MutableMapping[str, Tensor],
) -> Hooks:
    """Turn routed hooks into hooks of one run, which collect their decisions."""

    def run(path: str, hook: RoutedHook, module_input: Tensor, output: Tensor) -> Tensor:
        prefix = f"{name}.{path}."
        decision = {
            key.removeprefix(prefix): value
            for key, value in batch.routing.items()
            if key.startswith(prefix)
        }
        if not decision:
            decision = hook.decide(batch, module_input, output)
            decisions.update({prefix + key: value for key, value in decision.items()})
        return hook.apply(batch, module_input, output, decision)

    return {path: partial(run, path, hook) for path, hook in hooks.items()}


def _with_routing(result: Any, decisions: Mapping[str, Tensor]) -> Any:
    """Add the decisions of this run to the batch and the key-value cache of a result."""
    if isinstance(result, Batch | KVCache):
        return result._replace(routing={**result.routing, **decisions})
    if isinstance(result, tuple):
        return tuple(_with_routing(part, decisions) for part in result)
    return result


def _run_per_edit(
    model: Model, plan: HookPlan, params: Params, batch: Batch, run, *, same_layout: bool = False
) -> Any:
    """Run each edit over its rows and merge the results.

    With `same_layout`, returns None if only some of the results hold scored positions alone: rows
    with all their tokens and rows without do not fit in one batch.
    """
    groups = _rows_by_edit(batch.edit_index)
    parts = [
        run(_model_of_edit(model, plan, params, n), take_rows(batch, rows), rows)
        for n, rows in groups
    ]
    if same_layout and len({frozenset(part.layer_inputs) for part in parts}) > 1:
        return None
    return _merge_groups(parts, groups)


def _embed_per_edit(
    model, plan: HookPlan, params, inputs: Inputs, hooks, edit_index: Tensor | None
) -> Batch:
    # Pixels have no row axis in every family, so each edit embeds all rows and keeps its own.
    edit_index = _require_edit_index(edit_index)
    groups, parts = _rows_by_edit(edit_index), []
    for number, rows in groups:
        bound = _model_of_edit(model, plan, params, number)
        parts.append(
            take_rows(bound.embed(bound.params, inputs, hooks, edit_index=edit_index), rows)
        )
    return _merge_groups(parts, groups)


def _model_of_edit(model: Model, plan: HookPlan, params: Params, number: int) -> Model:
    base = model._replace(params=params)
    assert plan.bind_one is not None
    return base if number < 0 else plan.bind_one(params, number)


def _require_edit_index(edit_index: Tensor | None) -> Tensor:
    if edit_index is None:
        raise InvalidInputError(
            "a stacked delta that changes what runs before the decoder needs each row's edit "
            "there: pass edit_index=[B] to `embed` (and to `embed_next`)."
        )
    return edit_index


def _rows_by_edit(edit_index: Tensor) -> list[tuple[int, Tensor]]:
    """List (edit number, its rows) for every edit that occurs, in ascending order."""
    numbers = sorted(set(edit_index.tolist()))
    return [(number, (edit_index == number).nonzero()[:, 0]) for number in numbers]


def _merge_groups(parts: list[Any], groups: list[tuple[int, Tensor]]) -> Any:
    """Merge the results of groups of rows, in the order of the rows."""
    order = torch.cat([rows for _, rows in groups]).argsort()
    sizes = [len(rows) for _, rows in groups]
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[order]
    if isinstance(first, Batch):
        routing = _merge_routing([part.routing for part in parts], sizes, order)
        return take_rows(concat_batches(parts), order)._replace(routing=routing)
    if isinstance(first, KVCache):
        layers = range(len(first.keys))
        return KVCache(
            tuple(torch.cat([part.keys[n] for part in parts])[order] for n in layers),
            tuple(torch.cat([part.values[n] for part in parts])[order] for n in layers),
            torch.cat([part.attention_mask for part in parts])[order],
            torch.cat([part.next_position for part in parts])[order],
            _merge_routing([part.routing for part in parts], sizes, order),
        )
    return tuple(_merge_groups([part[n] for part in parts], groups) for n in range(len(first)))


def _merge_routing(
    parts: list[Mapping[str, Tensor]], sizes: list[int], order: Tensor
) -> dict[str, Tensor]:
    """Merge the routing decisions of all groups; zeros for rows whose edit did not take a decision.

    The size of a decision may differ between groups. Rows of a group whose decision has another
    shape than the largest get zeros, too: their edit does not use it.
    """
    merged = {}
    for name in sorted({name for part in parts for name in part}):
        present = [part[name] for part in parts if name in part]
        like = max(present, key=lambda note: note[:1].numel())
        values = [
            part[name]
            if name in part and part[name].shape[1:] == like.shape[1:]
            else like.new_zeros(size, *like.shape[1:])
            for part, size in zip(parts, sizes)
        ]
        merged[name] = torch.cat(values)[order]
    return merged


def _cache_rows(kv_cache: KVCache, rows: Tensor) -> KVCache:
    return KVCache(
        tuple(key[rows] for key in kv_cache.keys),
        tuple(value[rows] for value in kv_cache.values),
        kv_cache.attention_mask[rows],
        kv_cache.next_position[rows],
        {name: decision[rows] for name, decision in kv_cache.routing.items()},
    )


def _option_rows(options: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Select the rows of one edit from the options of `decode` that have a row axis."""
    row_options = dict(options)
    if isinstance(row_options.get("logit_positions"), Tensor):
        row_options["logit_positions"] = row_options["logit_positions"][rows]
    if row_options.get("kv_cache") is not None:
        row_options["kv_cache"] = _cache_rows(row_options["kv_cache"], rows)
    return row_options
