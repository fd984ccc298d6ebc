"""Bind a delta to a model: a new value that answers as edited and shares every tensor.

`bind` interprets kinds, never methods. A kind is one function (`KINDS`) that turns an entry into a
`Change`: parameters to lay over the base's, and rewrites at modules for rows of a batch.

    dense, one edit          overlay  W + d
    dense, stacked           rewrite  y + x d_e^T  (a bias: y + d_e), e = the row's edit
    lowrank, form "weight"   overlay  W + (B A).to(W.dtype), B A in fp32
    lowrank, form "act"      rewrite  y + (x A^T) B^T, in the model's dtype
    lowrank, "act_fp32"      rewrite  the product in fp32, cast once at the end (`chain`)
    lowrank, stacked         rewrite  with A_e, B_e, as "act_fp32" whatever the form
    codebook                 rewrite  a value in place of y where x comes near its key
    experts                  rewrite  the chosen experts' outputs added to a layer's
    prompt                   questions read with the facts that fit them put before
    scope                    another answer where the prompt lies in the scope of an edit
    masked                   rewrite  y + x D_m^T, m the side memory that the row's prompt activates

Stacked changes that no rewrite can express (a norm's scale, an embedding, anything in the vision
path) run edit by edit: once per edit that the batch names, each over its own rows in the decoder.

A *tied* parameter is one tensor with several uses, and an edit of it acts on all of them. An
embedding has no linear output to rewrite, so a low-rank change of one is laid over it ("weight"),
whatever the form.

Legend: B rows · L tokens · E edits.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.kernels import grouped_lora

from .bound import Plan, functions
from .call import compose
from .card import Base
from .change import Change, Kind
from .codebook import codebook
from .errors import BaseMismatch, ShapeMismatch, UnknownSite, listed
from .experts import experts
from .fingerprint import derive, fingerprint, origin
from .grouped import chain, grouped_linear
from .header import Codebook, Dense, Experts, Header, LowRank, Masked, Prompt, Scope
from .masked import change as masked_change
from .places import canonical, module_of, runs_above, runs_below, uses
from .prompts import prompt
from .scope import scope
from .stacks import unstack
from .types import Batch, Delta, Model, Params, Rewrite, Rewrites

__all__ = ["KINDS", "Change", "Kind", "bind"]


def bind(model: Model, delta: Delta, *, check: bool = True) -> Model:
    """The model as edited: a new value; `model` stays as it is, and undo is dropping the result.

    Use it like any model, with its own parameters: `bound.decode(bound.params, batch)`. Deltas
    bind one on another (`bound.deltas`). With a stacked delta each row of a batch runs under edit
    `batch.edit[b]`, -1 for the base. `check=False` skips comparing with the base (in a training
    loop over values of one delta).

    Raises BaseMismatch when the delta was made for another base, UnknownSite for parameters the
    model lacks, ShapeMismatch where tensors do not fit them; all violations at once.

        edited = bind(model, load("cat.safetensors"))
        generate(edited, [Query("What is this?", images=(picture,))])
    """
    if check:
        _check(model, delta)
    params = dict(model.params)
    changes = []
    for entry in delta.header.entries:
        so_far = model._replace(params=params)
        change = KINDS[type(entry)](so_far, delta.header, entry, _beside(so_far, entry, delta))
        for name, tensor in change.params.items():
            params[name] = derive(tensor, params[name])
        changes.append(change)
    bound = model._replace(params=params, **_functions(model, delta, changes))
    for change in changes:
        if change.wrap is not None:
            bound = change.wrap(bound)
    return bound._replace(deltas=(*model.deltas, delta))


def _beside(model: Model, entry: Any, delta: Delta) -> dict[str, Tensor]:
    """The tensors of an entry, on the device of the parameter they change."""
    home = model.params.get(canonical(model.card, getattr(entry, "name", "")))
    like = next(iter(model.params.values())) if home is None else home
    return {name: delta.tensors[name].to(like.device) for name in entry.tensors()}


def _functions(model: Model, delta: Delta, changes: list[Change]) -> dict[str, Any]:
    """The functions that a delta replaces; none where it only lays parameters over others."""
    made = [change.rewrites for change in changes if change.rewrites is not None]
    below = compose(*(change.below for change in changes))
    lowest: set[str] = set()
    if delta.header.stack:
        lowest = {
            name
            for entry in delta.header.entries
            if isinstance(entry, Dense | LowRank)
            for name in uses(model.card, entry.name)
            if runs_below(model.card, name)
        }
    if not (made or below or lowest):
        return {}

    def alone(params: Params, number: int) -> Model:
        return bind(model._replace(params=params), unstack(delta)[number], check=False)

    return functions(
        model,
        Plan(
            rewrites=made,
            below=below,
            apart=any(change.apart for change in changes),
            apart_below=bool(lowest),
            apart_tokens=f"{model.card.tokens}.weight" in lowest,
            alone=alone,
        ),
    )


def _check(model: Model, delta: Delta) -> None:
    """Refuse a delta that was made for another model, with everything that does not fit."""
    card, header = model.card, delta.header
    wrong = _differences(model, header)
    unknown = [
        entry.name for entry in header.entries if canonical(card, entry.name) not in model.params
    ]
    shapes = _misfits(model, delta)
    found = wrong + [f"{name} is no parameter of the model" for name in unknown] + shapes
    if wrong:
        raise BaseMismatch(
            f"the delta was made for {_named(header.base)}, the model is {card.id}: "
            f"{listed(found)}. Bind it to the base it was made for."
        )
    if unknown:
        near = difflib.get_close_matches(unknown[0], model.params, n=3)
        raise UnknownSite(
            f"a delta can only change parameters the model has ({card.id}): {listed(found)}."
            + (f" Near {unknown[0]}: {', '.join(near)}." if near else "")
        )
    if shapes:
        raise ShapeMismatch(f"a delta must fit the parameters it changes: {listed(shapes)}.")


def _differences(model: Model, header: Header) -> list[str]:
    card, base = model.card, header.base
    found = []
    if base.family and card.family and base.family != card.family:
        found.append(f"family {base.family!r} became {card.family!r}")
    if base.config and card.config and base.config != card.config:
        found.append(
            f"the configuration differs (sha256 {base.config[:8]}, here {card.config[:8]})"
        )
    for name, digest in base.touched.items():
        tensor = model.params.get(canonical(card, name))
        if tensor is None or digest in (fingerprint(origin(tensor)), fingerprint(tensor)):
            continue
        found.append(f"{name} holds other values ({str(tensor.dtype).removeprefix('torch.')} here)")
    return found


def _misfits(model: Model, delta: Delta) -> list[str]:
    found = []
    for entry in delta.header.entries:
        tensor = model.params.get(canonical(model.card, getattr(entry, "name", "")))
        if tensor is not None and tuple(tensor.shape) != tuple(entry.shape):
            found.append(
                f"{entry.name} is {list(tensor.shape)} in the model, "
                f"{list(entry.shape)} in the delta"
            )
    for name, (_, shape) in delta.header.tensors().items():
        if name not in delta.tensors:
            found.append(f"tensor {name} is missing")
        elif tuple(delta.tensors[name].shape) != shape:
            found.append(
                f"tensor {name} must be {list(shape)}, is {list(delta.tensors[name].shape)}"
            )
    return found


def _named(base: Base) -> str:
    return base.id + (f" at {base.revision[:12]}" if base.revision else "")


# The kinds.


def _dense(model: Model, header: Header, entry: Dense, tensors: Mapping[str, Tensor]) -> Change:
    """W' = W + d, in the wider dtype of the two, then in W's."""
    card, home, change = model.card, canonical(model.card, entry.name), tensors[entry.name]
    if not header.stack:
        base = model.params[home]
        return Change(params={home: (base + change).to(base.dtype)})
    makers: dict[str, Callable[[Batch], Rewrite]] = {}
    apart = False
    for name in filter(partial(runs_above, card), uses(card, home)):
        path, _, leaf = name.rpartition(".")
        if path not in card.linears or runs_below(card, path):
            apart = True
        elif leaf == "weight":
            maps = change.mT if path in card.transposed else change
            makers[path] = partial(_per_row, maps)
        else:
            makers[path] = partial(_shifted, change)
    return Change(rewrites=partial(_made, makers), apart=apart)


def _lowrank(model: Model, header: Header, entry: LowRank, tensors: Mapping[str, Tensor]) -> Change:
    """dW = B A, added as `header.form` says."""
    card, home = model.card, canonical(model.card, entry.name)
    down, up = tensors[f"{entry.name}.A"], tensors[f"{entry.name}.B"]
    if header.stack:
        paths = [module_of(name) for name in uses(card, home) if runs_above(card, name)]
        linear = [path for path in paths if path in card.linears and not runs_below(card, path)]
        makers = {path: partial(_per_row_lowrank, down, up) for path in linear}
        return Change(rewrites=partial(_made, makers), apart=len(linear) < len(paths))
    paths = [module_of(name) for name in uses(card, home)]
    plain = all(p in card.linears and runs_below(card, p) != runs_above(card, p) for p in paths)
    if header.form == "weight" or not plain:
        base = model.params[home]
        full = (up.float() @ down.float()).to(base.dtype)  # as PEFT merges: rounded, then added
        full = full.mT if entry.transposed else full
        return Change(params={home: base + full})
    exact = header.form == "act_fp32"
    rewrite = _act_fp32(chain(down, up, len(entry.rows))) if exact else _act(down, up)
    above = {path: rewrite for path in paths if runs_above(card, path)}
    below = {path: rewrite for path in paths if runs_below(card, path)}
    return Change(rewrites=(lambda batch: above) if above else None, below=below)


def _codebook(
    model: Model, header: Header, entry: Codebook, tensors: Mapping[str, Tensor]
) -> Change:
    """A value in place of the output where the prompt's last input lies in its key's ball."""
    path = module_of(canonical(model.card, entry.name))
    if path not in model.card.linears or runs_below(model.card, path):
        raise UnknownSite(
            f"a codebook's site must be a linear map in the decoder of {model.card.id}, and "
            f"{path!r} is none."
        )
    rewrite = codebook(entry, tensors, stacked=bool(header.stack))
    return Change(rewrites=lambda batch: {path: partial(rewrite, batch)})


KINDS: dict[type, Kind] = {
    Codebook: _codebook,
    Dense: _dense,
    Experts: experts,
    LowRank: _lowrank,
    Masked: masked_change,
    Prompt: prompt,
    Scope: scope,
}
"""Kind of entry -> the one function that says what it does. A new kind is a line here."""


# Rewrites.


def _made(makers: Mapping[str, Callable[[Batch], Rewrite]], batch: Batch) -> Rewrites:
    return {path: make(batch) for path, make in makers.items()}


def _act(down: Tensor, up: Tensor) -> Rewrite:
    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    return rewrite


def _act_fp32(maps: Sequence[Tensor]) -> Rewrite:
    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        return (y + reduce(F.linear, maps, x.float())).to(y.dtype)

    return rewrite


def _per_row(maps: Tensor, batch: Batch) -> Rewrite:
    """y + x maps[e]^T in the wider dtype, e = the row's edit."""

    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, maps.dtype)
        more = grouped_linear(_rows(x, batch).to(wide), maps.to(wide), batch.edit)
        return (y + more.view(y.shape)).to(y.dtype)

    return rewrite


def _per_row_lowrank(down: Tensor, up: Tensor, batch: Batch) -> Rewrite:
    """y + (x A_e^T) B_e^T in fp32, rounded once, e = the row's edit."""

    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        return grouped_lora(_rows(x, batch), down, up, batch.edit, _rows(y, batch)).view(y.shape)

    return rewrite


def _shifted(biases: Tensor, batch: Batch) -> Rewrite:
    """y + biases[e], e = the row's edit."""

    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        more = biases[batch.edit.clamp_min(0)] * (batch.edit >= 0)[:, None]  # [B out]
        return (_rows(y, batch) + more[:, None]).to(y.dtype).view(y.shape)

    return rewrite


def _rows(x: Tensor, batch: Batch) -> Tensor:
    """[B L in], also where a layer flattened rows and tokens (OPT does)."""
    return x.reshape(batch.edit.shape[0], -1, x.shape[-1])
