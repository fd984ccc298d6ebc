"""How the arguments of Hugging Face's layers become `Batch.layer_inputs`, and back.

Two captures of different sizes show which dimension of each tensor is rows, query tokens or key
tokens. The key of an input carries that layout (`functional/forward/batches.py`), so that batches
can be cut, padded and joined without knowing the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from errata.adapters.hf.capture import CapturedForward, LayerCall
from errata.adapters.hf.kv_cache import FunctionalKVCache
from errata.functional.errors import UnsupportedModelError

__all__ = [
    "ATTENTION_OUTPUT",
    "ArgumentSource",
    "CallTemplate",
    "LayerInputLayout",
    "ProbeShape",
    "added_input_key",
    "infer_layout",
]

ATTENTION_OUTPUT = "attention_output@bq_"
"""The extra of a thinned batch: what the last layer's attention gave at the scored positions."""


class ProbeShape(NamedTuple):
    """What a probe was made of; every number differs between the two probes."""

    num_rows: int
    query_length: int
    key_length: int


class ArgumentSource(NamedTuple):
    """One argument of a layer: an extra, the cache, or a constant."""

    key: str = ""
    is_cache: bool = False
    value: Any = None


class CallTemplate(NamedTuple):
    """A layer's arguments without the tensors."""

    spec: Any
    sources: tuple[ArgumentSource, ...]
    hidden_as_keyword: bool

    def fill(
        self,
        layout: LayerInputLayout,
        layer_inputs: Mapping[str, Tensor],
        hf_cache: FunctionalKVCache | None,
    ) -> LayerCall:
        """Fill in the arguments of a layer's call.

        Args:
            layout: Layout of the inputs.
            layer_inputs: Tensors of a batch, rows first.
            hf_cache: Cache to pass on, or None.

        Returns:
            The call.
        """
        leaves = [
            layout.restore(leaf.key, layer_inputs[leaf.key])
            if leaf.key in layer_inputs
            else (hf_cache if leaf.is_cache else leaf.value)
            for leaf in self.sources
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return LayerCall(tuple(args), kwargs, self.hidden_as_keyword)


class LayerInputLayout(NamedTuple):
    """For each layer, where its arguments come from; for each extra, where its rows were."""

    templates: tuple[CallTemplate, ...]
    cached_templates: (
        tuple[CallTemplate, ...] | None
    )  # None: the model keeps no key-value cache we can hand it
    input_keys: Mapping[tuple[int, str], str]  # (layer, argument) -> extra
    row_dims: Mapping[str, int]  # extra -> its row dimension, -1 for none
    cache_refusal: str = ""  # why there is no cache

    def pack(self, captured: CapturedForward) -> dict[str, Tensor]:
        """Collect the layers' inputs of a captured forward, rows first.

        Args:
            captured: Arguments of every layer.

        Returns:
            Tensors by key.
        """
        num_rows = captured.hidden_states.shape[0]
        layer_inputs: dict[str, Tensor] = {}
        source: dict[str, Tensor] = {}
        for number, call in enumerate(captured.layer_calls):
            for name, value in _named_leaves(call)[0]:
                if not isinstance(value, Tensor):
                    continue
                key = self.input_keys.get((number, name))
                if key is None:
                    raise UnsupportedModelError(
                        f"layer {number} was handed a tensor {name!r} that no probe showed; the "
                        "adapter does not know its layout."
                    )
                if key not in source:
                    source[key] = value
                    layer_inputs[key] = _move_rows_first(value, self.row_dims[key], num_rows)
                elif source[key] is not value:
                    raise UnsupportedModelError(
                        f"layer {number} was handed its own {name!r}, where the probe showed one "
                        "tensor for several layers."
                    )
        for number, value in captured.added.items():
            layer_inputs[added_input_key(number)] = value
        return layer_inputs

    def restore(self, key: str, value: Tensor) -> Tensor:
        """Move the rows of a tensor back to where the layer expects them.

        Args:
            key: Key of the input.
            value: Tensor, rows first.

        Returns:
            The tensor as the layer takes it.
        """
        row_dim = self.row_dims[key]
        return value[0] if row_dim < 0 else value.movedim(0, row_dim)


def added_input_key(number: int) -> str:
    """Key of what the model adds to the residual stream after a layer.

    Args:
        number: Number of the layer.

    Returns:
        The key.
    """
    return f"added.{number}@bq_"


def infer_layout(
    first: CapturedForward,
    first_shape: ProbeShape,
    second: CapturedForward,
    second_shape: ProbeShape,
    cache_refusal: str = "",
) -> LayerInputLayout:
    """Infer the layout of layer inputs by comparing two captures of different sizes.

    Args:
        first: Capture of the first probe.
        first_shape: Its sizes.
        second: Capture of the second, with cached tokens unless `cache_refusal` says why not.
        second_shape: Its sizes.
        cache_refusal: Why the model cannot use a cache.

    Returns:
        The layout.

    Raises:
        UnsupportedModelError: For arguments whose layout cannot be inferred.
    """
    input_keys: dict[tuple[int, str], str] = {}
    row_dims: dict[str, int] = {}
    second_leaves = [dict(_named_leaves(handed)[0]) for handed in second.layer_calls]
    keys_by_name: dict[str, dict[int, str]] = {}
    for number, call in enumerate(first.layer_calls):
        for name, value in _named_leaves(call)[0]:
            if not isinstance(value, Tensor):
                continue
            keys_by_id = keys_by_name.setdefault(name, {})
            if id(value) not in keys_by_id:
                second_value = second_leaves[number].get(name)
                if not isinstance(second_value, Tensor):
                    raise UnsupportedModelError(
                        f"layer {number} must always be handed the same arguments; {name!r} comes "
                        "only sometimes."
                    )
                letters, row_dim = _infer_dimensions(
                    name, value, first_shape, second_value, second_shape
                )
                suffix = f"#{len(keys_by_id)}" if keys_by_id else ""
                keys_by_id[id(value)] = f"{name}{suffix}@{letters}"
                row_dims[keys_by_id[id(value)]] = row_dim
            input_keys[number, name] = keys_by_id[id(value)]
    templates = tuple(
        _make_template(handed, n, input_keys) for n, handed in enumerate(first.layer_calls)
    )
    cached_templates = None
    if not cache_refusal:
        cached_templates = tuple(
            _make_template(handed, n, input_keys) for n, handed in enumerate(second.layer_calls)
        )
        if not all(
            any(leaf.is_cache for leaf in template.sources) for template in cached_templates
        ):
            cached_templates, cache_refusal = None, "its layers are not handed a key-value cache"
    return LayerInputLayout(templates, cached_templates, input_keys, row_dims, cache_refusal)


def _make_template(
    call: LayerCall, number: int, input_keys: Mapping[tuple[int, str], str]
) -> CallTemplate:
    named, spec = _named_leaves(call)
    sources = []
    for name, value in named:
        if isinstance(value, Tensor):
            sources.append(
                ArgumentSource(key=input_keys[number, name])
                if (number, name) in input_keys
                else ArgumentSource()
            )
        elif isinstance(value, FunctionalKVCache):
            sources.append(ArgumentSource(is_cache=True))
        else:
            sources.append(ArgumentSource(value=value))
    return CallTemplate(spec, tuple(sources), call.hidden_as_keyword)


def _named_leaves(call: LayerCall) -> tuple[list[tuple[str, Any]], Any]:
    flat, spec = pytree.tree_flatten_with_path((list(call.args), call.kwargs))
    named = []
    for path, value in flat:
        where, *rest = (str(getattr(part, "key", getattr(part, "idx", part))) for part in path)
        named.append((".".join(rest) if where == "1" else ".".join(["arg", *rest]), value))
    return named, spec


def _infer_dimensions(
    name: str,
    value: Tensor,
    first_shape: ProbeShape,
    second_value: Tensor,
    second_shape: ProbeShape,
) -> tuple[str, int]:
    """Letters of the dimensions with rows first, and where the rows were (-1: nowhere)."""
    meaning = {
        (first_shape.num_rows, second_shape.num_rows): "b",
        (
            1,
            second_shape.num_rows,
        ): "b",  # one table for all rows where positions are not given by row
        (first_shape.query_length, second_shape.query_length): "q",
        (first_shape.key_length, second_shape.key_length): "k",
    }
    letters: list[str] = []
    for pair in zip(value.shape, second_value.shape, strict=False):
        letter = "_" if pair[0] == pair[1] else meaning.get(pair, "?")
        # Without a past, queries and keys are as many: the first of two is the queries'.
        if (
            letter == "k"
            and first_shape.query_length == first_shape.key_length
            and second_shape.query_length == second_shape.key_length
        ):
            letter = "k" if "q" in letters else "q"
        letters.append(letter)
    if value.ndim != second_value.ndim or "?" in letters or letters.count("b") > 1:
        raise UnsupportedModelError(
            f"the dimensions of {name!r} must be rows, tokens or fixed; they went from "
            f"{tuple(value.shape)} to {tuple(second_value.shape)} for {first_shape} and "
            f"{second_shape}."
        )
    if "b" in letters:
        row_dim = letters.index("b")
    else:
        tokens = [i for i, letter in enumerate(letters) if letter != "_"]
        before = range(tokens[0] if tokens else 0)
        row_dim = next((i for i in before if value.shape[i] == 1), -1)
    rest = letters if row_dim < 0 else letters[:row_dim] + letters[row_dim + 1 :]
    return "b" + "".join(rest), row_dim


def _move_rows_first(value: Tensor, row_dim: int, num_rows: int) -> Tensor:
    value = value[None] if row_dim < 0 else value.movedim(row_dim, 0)
    return value if value.shape[0] == num_rows else value.expand(num_rows, *value.shape[1:])
