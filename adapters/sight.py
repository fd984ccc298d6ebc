"""What the vision path makes of a picture, computed once per content.

Rows that share a picture share its features, within a batch and from call to call. Each picture is
looked at alone, so what is found does not depend on who shared its batch: it equals the family's
own batched tower up to the rounding of another batch size.

n pictures · Q tokens of one · D width
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from errata.functional import Inputs, Params

from .images import Cache

__all__ = ["Sight"]

_METHOD = "get_image_features"  # what Hugging Face calls the way from pixels to the decoder
_FIELDS = ("pooler_output", "deepstack_features")  # what the forwards read of its result


class Sight:
    """Features by content of the picture, for one set of vision parameters.

    `names` are the parameters that features are made with; a model in which one of them is another
    tensor than in `base` is not served. `limit` bounds the features that are kept, in bytes.
    """

    def __init__(self, base: Params, names: tuple[str, ...], limit: int) -> None:
        self._base = {name: base[name] for name in names}
        self._seen = Cache(limit)

    def serves(self, params: Params, inputs: Inputs) -> bool:
        """Whether these rows' features can be had here: base parameters, still pictures, named."""
        return (
            any(inputs.keys)
            and not any("video" in name for name in inputs.pixels)
            and all(params.get(name) is tensor for name, tensor in self._base.items())
        )

    @contextmanager
    def looking(self, owner: nn.Module, inputs: Inputs) -> Iterator[None]:
        """Within the block, `owner` finds the features of the rows' pictures here."""
        original = getattr(owner, _METHOD)
        names = [name for row in inputs.keys for name in row]

        def look(*args: Any, **kwargs: Any) -> Any:
            given = _given(original, args, kwargs)
            cuts = _pictures(given, len(names))
            if cuts is None:
                return original(*args, **kwargs)
            return _joined(
                [
                    self._seen.get(name, lambda part=part: _features(original, part))
                    for name, part in zip(names, cuts)
                ]
            )

        vars(owner)[_METHOD] = look
        try:
            yield
        finally:
            vars(owner).pop(_METHOD)


def _given(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    given = dict(bound.arguments)
    return {**given, **given.pop("kwargs", {})}


def _pictures(given: Mapping[str, Any], count: int) -> list[dict[str, Any]] | None:
    """The arguments of each picture alone; None where they do not fall into pictures.

    Native resolution packs the patches of all pictures in one row, as many as the grid says.
    """
    grid = given.get("image_grid_thw")
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    sizes = dict.fromkeys(tensors, [1] * count)
    if grid is not None and "pixel_values" in tensors:
        sizes["pixel_values"] = grid.prod(-1).tolist()
    if not tensors or any(len(value) != sum(sizes[name]) for name, value in tensors.items()):
        return None
    alone = [dict(given) for _ in range(count)]
    for name, value in tensors.items():
        for mine, part in zip(alone, value.split(sizes[name])):
            mine[name] = part
    return alone


def _features(call: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """The features of one picture: [1 Q D], or lists of one [Q D]."""
    with torch.no_grad():
        made = call(**given)
    return {name: found for name in _FIELDS if (found := getattr(made, name, None)) is not None}


def _joined(parts: list[dict[str, Any]]) -> SimpleNamespace:
    return SimpleNamespace(**{name: _together([p[name] for p in parts]) for name in parts[0]})


def _together(values: list[Any]) -> Any:
    """Features of several pictures as the family has them of a batch."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if values[0] and not isinstance(values[0][0], Tensor):  # a list per level
        return [_together([value[level] for value in values]) for level in range(len(values[0]))]
    return [tensor for value in values for tensor in value]
