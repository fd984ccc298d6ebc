"""Run a plain Hugging Face model under a delta: its `generate`, `pipeline`, `Trainer.evaluate`.

Nothing is written: a changed parameter is another object in the module's place, a low-rank change
in activation form is a forward hook; `detach` puts the very same objects back.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from errata.functional import Delta, Dense
from errata.functional.errors import (
    BadInput,
    BaseMismatch,
    KindUnsupported,
    ShapeMismatch,
    UnknownSite,
    listed,
)
from errata.functional.fingerprint import derive, fingerprint, origin
from errata.functional.grouped import chain

__all__ = ["Attached", "attach"]


class _Place(NamedTuple):
    """One place of a parameter: a module, its path, and the name it holds the parameter by."""

    module: nn.Module
    path: str
    leaf: str


class Attached:
    """A module under a delta, until `detach`. Also a context manager that detaches at its end."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._swapped: list[tuple[nn.Module, str, nn.Parameter | None, nn.Parameter]] = []
        self._hooks: list[Any] = []

    def detach(self) -> None:
        """Leave the module as it was found, bit for bit and object for object.

        Raises BadInput, changing nothing, where another delta lies on top of its parameters.
        """
        laid = {(id(module), leaf): (module, leaf, new) for module, leaf, _, new in self._swapped}
        if any(module._parameters[leaf] is not new for module, leaf, new in laid.values()):
            raise BadInput(
                "deltas are detached in reverse order, and a parameter of this one was replaced "
                "since: detach what was attached on top of it first."
            )
        while self._hooks:
            self._hooks.pop().remove()
        while self._swapped:
            module, leaf, before, _ = self._swapped.pop()
            module._parameters[leaf] = before

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _lay(self, places: list[_Place], value: Tensor) -> None:
        new = nn.Parameter(value, requires_grad=False)
        derive(new, _held(places))
        for module, _, leaf in places:
            self._swapped.append((module, leaf, module._parameters[leaf], new))
            module._parameters[leaf] = new

    def _hook(self, places: list[_Place], maps: Sequence[Tensor], exact: bool) -> None:
        for place in places:
            hook = place.module.register_forward_hook(_addition(maps, exact), with_kwargs=True)
            self._hooks.append(hook)


def attach(module: nn.Module, delta: Delta, *, check: bool = True) -> Attached:
    """Let `module` answer as edited; what it computes is what `bind` computes, bit for bit.

        with attach(model, load("cat.safetensors")):
            model.generate(**inputs)

    Deltas attach one on another and are detached in reverse order. `check=False` skips comparing
    the parameters' hashes. Raises, before anything is changed, BaseMismatch for a delta of another
    base, UnknownSite and ShapeMismatch for parameters that do not fit, KindUnsupported for kinds
    that are more than a changed linear map and for stacked deltas.
    """
    _can(delta)
    places = _places(module, delta)
    _fits(module, delta, places, check)
    attached = Attached(module)
    try:
        for entry in delta.header.entries:
            _one(attached, delta, entry, places[entry.name])
    except BaseException:
        attached.detach()
        raise
    return attached


def _one(attached: Attached, delta: Delta, entry: Any, places: list[_Place]) -> None:
    base = places[0].module._parameters[places[0].leaf]
    assert base is not None
    mine = {name: delta.tensors[name].to(base.device) for name in entry.tensors()}
    if isinstance(entry, Dense):
        attached._lay(places, (base + mine[entry.name]).to(base.dtype).detach())
        return
    down, up = mine[f"{entry.name}.A"], mine[f"{entry.name}.B"]
    if delta.header.form == "weight" or not all(_linear(place) for place in places):
        full = (up.float() @ down.float()).to(base.dtype)
        attached._lay(places, (base + (full.mT if entry.transposed else full)).detach())
    else:
        exact = delta.header.form == "act_fp32"
        maps = chain(down, up, len(entry.rows)) if exact else (down, up)
        attached._hook(places, maps, exact)


def _addition(maps: Sequence[Tensor], exact: bool) -> Any:
    """y + x mapped by one after another, in x's dtype or, exact, in fp32."""

    def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        wide = torch.float32 if exact else x.dtype
        more = reduce(F.linear, (each.to(wide) for each in maps), x.to(wide))
        return (y + more).to(y.dtype)

    return hook


def _linear(place: _Place) -> bool:
    """Whether the place is a linear map that is called as one, so that a hook sees it.

    The output projection of `nn.MultiheadAttention` is a linear map that never is called.
    """
    from transformers.pytorch_utils import Conv1D

    called = not isinstance(place.module, NonDynamicallyQuantizableLinear)
    return place.leaf == "weight" and called and isinstance(place.module, nn.Linear | Conv1D)


def _can(delta: Delta) -> None:
    header = delta.header
    if header.stack:
        raise KindUnsupported(
            "a stacked delta holds edits side by side, and a plain module runs one at a time: "
            "attach one of `stacks.unstack(delta)`, or use `bind_rows`."
        )
    odd = sorted({type(e).__name__.lower() for e in header.entries} - {"dense", "lowrank"})
    if odd:
        raise KindUnsupported(
            f"a delta of kind {', '.join(odd)} does more than change a linear map, and can not be "
            "attached to a plain module: use `adapters.adapt` and `bind`."
        )


def _places(module: nn.Module, delta: Delta) -> dict[str, list[_Place]]:
    """Where each entry's parameter is; a tied one is in several places."""
    homes: dict[int, list[_Place]] = {}
    names: dict[str, nn.Parameter] = {}
    for path, inner in module.named_modules():
        for leaf, parameter in inner._parameters.items():
            if parameter is not None:
                homes.setdefault(id(parameter), []).append(_Place(inner, path, leaf))
                names[f"{path}.{leaf}" if path else leaf] = parameter
    missing = [entry.name for entry in delta.header.entries if entry.name not in names]
    if missing:
        near = difflib.get_close_matches(missing[0], names, n=3)
        raise UnknownSite(
            f"a delta can only change parameters the module has; {type(module).__name__} lacks "
            f"{listed(missing)}" + (f" (near: {', '.join(near)})." if near else ".")
        )
    return {entry.name: homes[id(names[entry.name])] for entry in delta.header.entries}


def _fits(module: nn.Module, delta: Delta, places: Mapping[str, list[_Place]], check: bool) -> None:
    shapes = []
    for entry in delta.header.entries:
        shape = tuple(_held(places[entry.name]).shape)
        if shape != tuple(entry.shape):
            shapes.append(f"{entry.name} has shape {list(shape)}, not {list(entry.shape)}")
    if shapes:
        raise ShapeMismatch(f"a delta must fit the parameters it changes: {listed(shapes)}.")
    wrong = list(_differences(module, delta, places)) if check else []
    if wrong:
        raise BaseMismatch(
            f"the delta was made for {delta.header.base.id}, and this {type(module).__name__} "
            f"differs: {listed(wrong)}. Attach it to the base it was made for."
        )


def _differences(
    module: nn.Module, delta: Delta, places: Mapping[str, list[_Place]]
) -> Iterator[str]:
    base = delta.header.base
    family = getattr(getattr(module, "config", None), "model_type", "")
    if base.family and family and base.family != family:
        yield f"family {family!r} is not {base.family!r}"
    for name, digest in base.touched.items():
        held = _held(places[name]) if name in places else None
        if held is not None and digest not in (fingerprint(origin(held)), fingerprint(held)):
            yield f"{name} holds other values"


def _held(places: list[_Place]) -> nn.Parameter:
    parameter = places[0].module._parameters[places[0].leaf]
    assert parameter is not None
    return parameter
