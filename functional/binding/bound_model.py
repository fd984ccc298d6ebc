"""Bind a delta to a model: a new, edited model that shares every tensor with the base.

`bind` interprets kinds, never methods. A kind is one function (`KINDS`) that turns an entry into a
`Patch`: parameters that replace the base's, hooks on modules, a wrapper of the model.

    dense, one edit          parameter  W + d
    dense, stacked           hook       y + x d_e^T  (a bias: y + d_e), e = the row's edit
    lowrank, "weight"        parameter  W + (B A).to(W.dtype), B A in fp32
    lowrank, "act"           hook       y + (x A^T) B^T, in the model's dtype
    lowrank, "act_fp32"      hook       the product in fp32, cast once at the end
    lowrank, stacked         hook       with A_e, B_e, as "act_fp32" whatever the arithmetic
    codebook                 hook       a value replaces y if x is near its key
    experts                  hook       the outputs of the chosen experts added to a layer's
    prompt                   wrapper    facts that fit a question are put before it
    scope                    wrapper    another answer if the prompt is in the scope of an edit
    masked                   hook       y + x D_m^T, m the side memory that the prompt activates

Stacked changes that no hook can express (the scale of a norm, an embedding, anything in the vision
path) run edit by edit: once per edit in the batch, each over its own rows in the decoder.

A *tied* parameter is one tensor with several uses, and an edit of it acts on all of them. An
embedding has no linear output to add to. A low-rank change of one is therefore added to the
parameter ("weight"), whatever the arithmetic.

Legend: B rows · L tokens · E edits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from errata.functional.binding.edited_forward import HookPlan, edited_functions
from errata.functional.card import BaseModel
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import (
    BaseMismatchError,
    ShapeError,
    UnknownSiteError,
    join_messages,
    nearest_names,
)
from errata.functional.forward.hooks import compose_hooks
from errata.functional.hashing import base_parameter, hash_parameter, mark_edited
from errata.functional.header import Header
from errata.functional.kinds.common.patch import Patch
from errata.functional.kinds.table import KINDS
from errata.functional.types import Delta, Model, Params

__all__ = ["bind"]


def bind(model: Model, delta: Delta, *, check: bool = True) -> Model:
    """Bind a delta to a model.

    The result shares every tensor with `model`, which is unchanged. To undo the edit, drop the
    result. A bound model can be bound to further deltas; `bound.deltas` lists them. With a stacked
    delta each row of a batch runs under edit `batch.edit_index[b]`, -1 for the base.

    Args:
        model: The model, bound or not.
        delta: The edit.
        check: Whether to compare hashes with the base. False in a training loop over values of one
            delta.

    Returns:
        The edited model. Use it with its own parameters: `bound.decode(bound.params, batch)`.

    Raises:
        BaseMismatchError: If the delta was made for another base.
        UnknownSiteError: If the model lacks a parameter of the delta.
        ShapeError: If a tensor does not fit its parameter. Each error names all violations.

    Example:
        >>> import torch
        >>> from errata import adapters
        >>> from errata.editors import configure, make_editor
        >>> from errata.functional import Query, generate
        >>> model = adapters.load_micro("llava")
        >>> editor = make_editor(configure("finetune", num_steps=8, lr=3e-3))
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> delta, _ = editor.edit(model, state, [Query("who is it?", "bo")])
        >>> edited = bind(model, delta)
        >>> len(edited.deltas), len(model.deltas)
        (1, 0)
    """
    if check:
        _check_fit(model, delta)
    params = dict(model.params)
    patches = []
    for entry in delta.header.entries:
        partly_bound = model._replace(params=params)
        patch = KINDS[type(entry)].apply(
            partly_bound, delta.header, entry, _entry_tensors(partly_bound, entry, delta)
        )
        for name, tensor in patch.params.items():
            params[name] = mark_edited(tensor, params[name])
        patches.append(patch)
    bound = model._replace(params=params, **_replaced_functions(model, delta, patches))
    for patch in patches:
        if patch.wrap is not None:
            bound = patch.wrap(bound)
    return bound._replace(deltas=(*model.deltas, delta))


def _entry_tensors(model: Model, entry: Any, delta: Delta) -> dict[str, Tensor]:
    """Return the tensors of an entry, on the device of the parameter they change."""
    home = model.params.get(model.card.canonical_name(getattr(entry, "name", "")))
    like = next(iter(model.params.values())) if home is None else home
    return {name: delta.tensors[name].to(like.device) for name in entry.tensor_specs()}


def _replaced_functions(model: Model, delta: Delta, patches: list[Patch]) -> dict[str, Any]:
    """Return the functions that a delta replaces; none if it only replaces parameters."""
    hook_makers: list[Any] = []
    for entry, patch in zip(delta.header.entries, patches, strict=True):
        if patch.hooks is not None:
            hook_makers.append(patch.hooks)
        if patch.routed_hooks:  # one delta may lie on another with the same entry
            kind = type(entry).__struct_config__.tag
            hook_makers.append((f"{entry.name}.{kind}.{len(model.deltas)}", patch.routed_hooks))
    embed_hooks = compose_hooks(*(change.embed_hooks for change in patches))
    embed_names: set[str] = set()
    if delta.header.stack:
        embed_names = {
            name
            for entry in delta.header.entries
            if entry.is_weight_change()
            for name in model.card.all_names(entry.name)
            if model.card.before_decoder(name)
        }
    if not (hook_makers or embed_hooks or embed_names):
        return {}

    def bind_one(params: Params, number: int) -> Model:
        return bind(model._replace(params=params), unstack(delta)[number], check=False)

    return edited_functions(
        model,
        HookPlan(
            hooks=hook_makers,
            embed_hooks=embed_hooks,
            per_edit=any(change.per_edit for change in patches),
            embed_per_edit=bool(embed_names),
            embed_next_per_edit=f"{model.card.token_embedding}.weight" in embed_names,
            bind_one=bind_one,
        ),
    )


def _check_fit(model: Model, delta: Delta) -> None:
    """Reject a delta that was made for another model, listing everything that does not fit."""
    card, header = model.card, delta.header
    base_differences = _base_differences(model, header)
    unknown = [
        entry.name
        for entry in header.entries
        if card.canonical_name(entry.name) not in model.params
    ]
    shapes = _shape_mismatches(model, delta)
    problems = (
        base_differences + [f"{name} is no parameter of the model" for name in unknown] + shapes
    )
    if base_differences:
        raise BaseMismatchError(
            f"the delta was made for {_describe_base(header.base)}, the model is {card.id}: "
            f"{join_messages(problems)}. Bind it to the base it was made for."
        )
    if unknown:
        raise UnknownSiteError(
            f"a delta can only change parameters the model has ({card.id}): "
            f"{join_messages(problems)}{nearest_names(unknown[0], model.params)}."
        )
    if shapes:
        raise ShapeError(f"a delta must fit the parameters it changes: {join_messages(shapes)}.")


def _base_differences(model: Model, header: Header) -> list[str]:
    card, base = model.card, header.base
    differences = []
    if base.family and card.family and base.family != card.family:
        differences.append(f"family {base.family!r} became {card.family!r}")
    if base.config_hash and card.config_hash and base.config_hash != card.config_hash:
        differences.append(
            f"the configuration differs (sha256 {base.config_hash[:8]}, here "
            f"{card.config_hash[:8]})"
        )
    for name, digest in base.parameter_hashes.items():
        tensor = model.params.get(card.canonical_name(name))
        if tensor is None or digest in (
            hash_parameter(base_parameter(tensor)),
            hash_parameter(tensor),
        ):
            continue
        differences.append(
            f"{name} holds other values ({str(tensor.dtype).removeprefix('torch.')} here)"
        )
    return differences


def _shape_mismatches(model: Model, delta: Delta) -> list[str]:
    mismatches = []
    for entry in delta.header.entries:
        tensor = model.params.get(model.card.canonical_name(getattr(entry, "name", "")))
        if tensor is not None and tuple(tensor.shape) != tuple(entry.shape):
            mismatches.append(
                f"{entry.name} is {list(tensor.shape)} in the model, "
                f"{list(entry.shape)} in the delta"
            )
    for name, (_, shape) in delta.header.tensor_specs().items():
        if name not in delta.tensors:
            mismatches.append(f"tensor {name} is missing")
        elif tuple(delta.tensors[name].shape) != shape:
            mismatches.append(
                f"tensor {name} must be {list(shape)}, is {list(delta.tensors[name].shape)}"
            )
    return mismatches


def _describe_base(base: BaseModel) -> str:
    return base.id + (f" at {base.revision[:12]}" if base.revision else "")
