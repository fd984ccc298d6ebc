"""Run a plain Hugging Face model under a delta: its `generate`, `pipeline`, `Trainer.evaluate`.

Nothing is written: a changed parameter is another object in the module's place, a low-rank change
in activation form is a forward hook; `detach` puts the very same objects back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from errata.functional import Delta
from errata.functional.errors import (
    BaseMismatchError,
    InvalidInputError,
    ShapeError,
    UnknownSiteError,
    UnsupportedKindError,
    join_messages,
    nearest_names,
)
from errata.functional.forward.grouped_linear import low_rank_maps
from errata.functional.hashing import base_parameter, hash_parameter, mark_edited
from errata.functional.kinds.schema import Dense, LowRank

__all__ = ["AttachedEdit", "attach"]


class _ParameterOwner(NamedTuple):
    """One place of a parameter: a module, its path, and the name it holds the parameter by."""

    module: nn.Module
    path: str
    leaf: str


class AttachedEdit:
    """A module under a delta, until `detach`. Also a context manager that detaches at its end."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._replaced_parameters: list[
            tuple[nn.Module, str, nn.Parameter | None, nn.Parameter]
        ] = []
        self._hooks: list[Any] = []

    def detach(self) -> None:
        """Leave the module as it was found, bit for bit and object for object.

        Raises InvalidInputError, changing nothing, where another delta lies on top of its
        parameters.
        """
        current = {
            (id(module), leaf): (module, leaf, new)
            for module, leaf, _, new in self._replaced_parameters
        }
        if any(module._parameters[leaf] is not new for module, leaf, new in current.values()):
            raise InvalidInputError(
                "deltas are detached in reverse order, and a parameter of this one was replaced "
                "since: detach what was attached on top of it first."
            )
        while self._hooks:
            self._hooks.pop().remove()
        while self._replaced_parameters:
            module, leaf, original, _ = self._replaced_parameters.pop()
            module._parameters[leaf] = original

    def __enter__(self) -> AttachedEdit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _replace_parameter(self, owners: list[_ParameterOwner], value: Tensor) -> None:
        new = nn.Parameter(value, requires_grad=False)
        mark_edited(new, _parameter_of(owners))
        for module, _, leaf in owners:
            self._replaced_parameters.append((module, leaf, module._parameters[leaf], new))
            module._parameters[leaf] = new

    def _add_hooks(
        self, owners: list[_ParameterOwner], maps: Sequence[Tensor], exact: bool
    ) -> None:
        for owner in owners:
            hook = owner.module.register_forward_hook(
                _make_addition_hook(maps, exact), with_kwargs=True
            )
            self._hooks.append(hook)


def attach(module: nn.Module, delta: Delta, *, check: bool = True) -> AttachedEdit:
    """Attach a delta to a Hugging Face module in place. It computes what `bind` computes, bit for
    bit.

    Deltas attach one on another and are detached in reverse order. Nothing is changed if an error
    is raised.

    Args:
        module: The module.
        delta: A delta of kinds `dense` and `lowrank`, not stacked.
        check: Whether to compare the parameters' hashes.

    Returns:
        The attached edit. Its `detach()`, or the end of a `with` block, restores the module.

    Raises:
        BaseMismatchError: If the delta was made for another base.
        UnknownSiteError: If the module lacks a parameter of the delta.
        ShapeError: If a tensor does not fit its parameter.
        UnsupportedKindError: For kinds that are more than a changed linear map, and stacked deltas.
    """
    _require_supported(delta)
    owners = _find_owners(module, delta)
    _require_fit(module, delta, owners, check)
    attached_edit = AttachedEdit(module)
    try:
        for entry in delta.header.entries:
            _apply_entry(attached_edit, delta, entry, owners[entry.name])
    except BaseException:
        attached_edit.detach()
        raise
    return attached_edit


def _apply_entry(
    attached_edit: AttachedEdit, delta: Delta, entry: Any, owners: list[_ParameterOwner]
) -> None:
    base = owners[0].module._parameters[owners[0].leaf]
    assert base is not None
    tensors = {name: delta.tensors[name].to(base.device) for name in entry.tensor_specs()}
    if isinstance(entry, Dense):
        attached_edit._replace_parameter(
            owners, (base + tensors[entry.name]).to(base.dtype).detach()
        )
        return
    down, up = tensors[f"{entry.name}.A"], tensors[f"{entry.name}.B"]
    if delta.header.arithmetic == "weight" or not all(_is_linear_call(place) for place in owners):
        full = (up.float() @ down.float()).to(base.dtype)
        attached_edit._replace_parameter(
            owners, (base + (full.mT if entry.transposed else full)).detach()
        )
    else:
        exact = delta.header.arithmetic == "act_fp32"
        maps = low_rank_maps(down, up, len(entry.edit_ranks)) if exact else (down, up)
        attached_edit._add_hooks(owners, maps, exact)


def _make_addition_hook(maps: Sequence[Tensor], exact: bool) -> Any:
    """y + x mapped by one after another, in x's dtype or, exact, in fp32."""

    def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        dtype = torch.float32 if exact else x.dtype
        change = reduce(F.linear, (each.to(dtype) for each in maps), x.to(dtype))
        return (y + change).to(y.dtype)

    return hook


def _is_linear_call(owner: _ParameterOwner) -> bool:
    """Whether the place is a linear map that is called as one, so that a hook sees it.

    The output projection of `nn.MultiheadAttention` is a linear map that never is called.
    """
    from transformers.pytorch_utils import Conv1D

    called = not isinstance(owner.module, NonDynamicallyQuantizableLinear)
    return owner.leaf == "weight" and called and isinstance(owner.module, nn.Linear | Conv1D)


def _require_supported(delta: Delta) -> None:
    header = delta.header
    if header.stack:
        raise UnsupportedKindError(
            "a stacked delta holds edits side by side, and a plain module runs one at a time: "
            "attach one of `stacking.unstack(delta)`, or use `bind_rows`."
        )
    unsupported = sorted({type(e).__name__.lower() for e in header.entries} - {"dense", "lowrank"})
    if unsupported:
        raise UnsupportedKindError(
            f"a delta of kind {', '.join(unsupported)} does more than change a linear map, and "
            "cannot be "
            "attached to a plain module: use `adapters.from_module` and `bind`."
        )


def _find_owners(module: nn.Module, delta: Delta) -> dict[str, list[_ParameterOwner]]:
    """Where each entry's parameter is; a tied one is in several places."""
    owners_by_id: dict[int, list[_ParameterOwner]] = {}
    names: dict[str, nn.Parameter] = {}
    for path, inner in module.named_modules():
        for leaf, parameter in inner._parameters.items():
            if parameter is not None:
                owners_by_id.setdefault(id(parameter), []).append(
                    _ParameterOwner(inner, path, leaf)
                )
                names[f"{path}.{leaf}" if path else leaf] = parameter
    missing = [entry.name for entry in delta.header.entries if entry.name not in names]
    if missing:
        raise UnknownSiteError(
            f"a delta can only change parameters the module has; {type(module).__name__} lacks "
            f"{join_messages(missing)}{nearest_names(missing[0], names)}."
        )
    owners = {}
    for entry in delta.header.entries:
        everywhere = owners_by_id[id(names[entry.name])]
        own = [o for o in everywhere if ".".join(filter(None, (o.path, o.leaf))) == entry.name]
        is_added_to_outputs = (
            isinstance(entry, LowRank)
            and delta.header.arithmetic != "weight"
            and own
            and _is_linear_call(own[0])
        )
        owners[entry.name] = own if is_added_to_outputs else everywhere
    return owners


def _require_fit(
    module: nn.Module, delta: Delta, owners: Mapping[str, list[_ParameterOwner]], check: bool
) -> None:
    shapes = []
    for entry in delta.header.entries:
        shape = tuple(_parameter_of(owners[entry.name]).shape)
        if shape != tuple(entry.shape):
            shapes.append(f"{entry.name} has shape {list(shape)}, not {list(entry.shape)}")
    if shapes:
        raise ShapeError(f"a delta must fit the parameters it changes: {join_messages(shapes)}.")
    wrong = list(_base_differences(module, delta, owners)) if check else []
    if wrong:
        raise BaseMismatchError(
            f"the delta was made for {delta.header.base.id}, and this {type(module).__name__} "
            f"differs: {join_messages(wrong)}. Attach it to the base it was made for."
        )


def _base_differences(
    module: nn.Module, delta: Delta, owners: Mapping[str, list[_ParameterOwner]]
) -> Iterator[str]:
    base = delta.header.base
    family = getattr(getattr(module, "config", None), "model_type", "")
    if base.family and family and base.family != family:
        yield f"family {family!r} is not {base.family!r}"
    for name, digest in base.parameter_hashes.items():
        parameter = _parameter_of(owners[name]) if name in owners else None
        if parameter is not None and digest not in (
            hash_parameter(base_parameter(parameter)),
            hash_parameter(parameter),
        ):
            yield f"{name} holds other values"


def _parameter_of(owners: list[_ParameterOwner]) -> nn.Parameter:
    parameter = owners[0].module._parameters[owners[0].leaf]
    assert parameter is not None
    return parameter
