"""What the vision path makes of an image, computed once per content.

Rows that share an image share its features, within a batch and from call to call. Each image is
looked at alone, so what is found does not depend on who shared its batch: it equals the family's
own batched tower up to the rounding of another batch size.

n images · Q tokens of one · D width
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from errata.adapters.inputs.lru_cache import LRUCache
from errata.functional import Inputs, Params

__all__ = ["VisionFeatureCache"]

_FEATURE_METHOD = "get_image_features"  # what Hugging Face calls the way from pixels to the decoder
_FEATURE_FIELDS = ("pooler_output", "deepstack_features")  # what the forwards read of its result


class VisionFeatureCache:
    """Features by content of the image, for one set of vision parameters.

    `names` are the parameters that features are made with; a model in which one of them is another
    tensor than in `base` is not served. `limit` bounds the features that are kept, in bytes.
    """

    def __init__(self, base: Params, names: tuple[str, ...], max_bytes: int) -> None:
        self._base = {name: base[name] for name in names}
        self._cache = LRUCache(max_bytes)

    def serves(self, params: Params, inputs: Inputs) -> bool:
        """Whether the cache serves these rows: base parameters, no video, images with content ids.

        Args:
            params: Parameters by name.
            inputs: Preprocessed rows.

        Returns:
            True or False.
        """
        return (
            any(inputs.content_ids)
            and not any("video" in name for name in inputs.vision_inputs)
            and all(params.get(name) is tensor for name, tensor in self._base.items())
        )

    @contextmanager
    def use_cached_features(self, owner: nn.Module, inputs: Inputs) -> Iterator[None]:
        """Serve a module's image features from the cache within a `with` block.

        Args:
            owner: The module that computes image features.
            inputs: Preprocessed rows.

        Yields:
            Nothing.
        """
        original = getattr(owner, _FEATURE_METHOD)
        content_ids = [name for row in inputs.content_ids for name in row]

        def get_features(*args: Any, **kwargs: Any) -> Any:
            arguments = _bind_arguments(original, args, kwargs)
            per_image = _split_per_image(arguments, len(content_ids))
            if per_image is None:
                return original(*args, **kwargs)
            return _concat_features(
                [
                    self._cache.get(name, lambda part=part: _compute_features(original, part))
                    for name, part in zip(content_ids, per_image)
                ]
            )

        vars(owner)[_FEATURE_METHOD] = get_features
        try:
            yield
        finally:
            vars(owner).pop(_FEATURE_METHOD)


def _bind_arguments(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    return {**arguments, **arguments.pop("kwargs", {})}


def _split_per_image(arguments: Mapping[str, Any], num_images: int) -> list[dict[str, Any]] | None:
    """The arguments of each image alone; None where they do not fall into images.

    Native resolution packs the patches of all images in one row, as many as the grid says.
    """
    grid = arguments.get("image_grid_thw")
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    sizes = dict.fromkeys(tensors, [1] * num_images)
    if grid is not None and "pixel_values" in tensors:
        sizes["pixel_values"] = grid.prod(-1).tolist()
    if not tensors or any(len(value) != sum(sizes[name]) for name, value in tensors.items()):
        return None
    per_image = [dict(arguments) for _ in range(num_images)]
    for name, value in tensors.items():
        for image_arguments, part in zip(per_image, value.split(sizes[name])):
            image_arguments[name] = part
    return per_image


def _compute_features(call: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The features of one image: [1 Q D], or lists of one [Q D]."""
    with torch.no_grad():
        output = call(**arguments)
    return {
        name: value
        for name in _FEATURE_FIELDS
        if (value := getattr(output, name, None)) is not None
    }


def _concat_features(parts: list[dict[str, Any]]) -> SimpleNamespace:
    return SimpleNamespace(**{name: _concat_values([p[name] for p in parts]) for name in parts[0]})


def _concat_values(values: list[Any]) -> Any:
    """Features of several images as the family has them of a batch."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if values[0] and not isinstance(values[0][0], Tensor):  # a list per level
        return [
            _concat_values([value[level] for value in values]) for level in range(len(values[0]))
        ]
    return [tensor for value in values for tensor in value]
