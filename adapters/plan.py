"""How what Hugging Face hands its layers becomes `Batch.extras`, and back.

Two captures of different sizes show which dimension of each tensor is rows, query tokens or key
tokens. The key of an extra carries that layout (`functional/rows.py`), so that batches can be cut,
padded and joined without knowing the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional.errors import ModelUnsupported

from .capture import Capture, Handed
from .skeleton import Ledger

__all__ = ["ATTENDED", "Leaf", "Plan", "Sizes", "Template", "added_key", "make_plan"]

ATTENDED = "attended@bq_"
"""The extra of a thinned batch: what the last layer's attention gave at the scored positions."""


class Sizes(NamedTuple):
    """What a probe was made of; every number differs between the two probes."""

    rows: int
    query: int
    keys: int


class Leaf(NamedTuple):
    """One argument of a layer: an extra, the cache, or a constant."""

    key: str = ""
    cache: bool = False
    value: Any = None


class Template(NamedTuple):
    """A layer's arguments without the tensors."""

    spec: Any
    leaves: tuple[Leaf, ...]
    named: bool

    def fill(self, plan: Plan, extras: Mapping[str, Tensor], ledger: Ledger | None) -> Handed:
        leaves = [
            plan.restore(leaf.key, extras[leaf.key])
            if leaf.key in extras
            else (ledger if leaf.cache else leaf.value)
            for leaf in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return Handed(tuple(args), kwargs, self.named)


class Plan(NamedTuple):
    """For each layer, where its arguments come from; for each extra, where its rows were."""

    plain: tuple[Template, ...]
    cached: tuple[Template, ...] | None  # None: the model keeps no key-value cache we can hand it
    names: Mapping[tuple[int, str], str]  # (layer, argument) -> extra
    rows: Mapping[str, int]  # extra -> its row dimension, -1 for none
    refusal: str = ""  # why there is no cache

    def pack(self, seen: Capture) -> dict[str, Tensor]:
        """The extras of a batch, from what its layers were handed."""
        count = seen.hidden.shape[0]
        extras: dict[str, Tensor] = {}
        source: dict[str, Tensor] = {}
        for number, handed in enumerate(seen.handed):
            for name, value in _named_leaves(handed)[0]:
                if not isinstance(value, Tensor):
                    continue
                key = self.names.get((number, name))
                if key is None:
                    raise ModelUnsupported(
                        f"layer {number} was handed a tensor {name!r} that no probe showed; the "
                        "adapter does not know its layout."
                    )
                if key not in source:
                    source[key] = value
                    extras[key] = _rows_first(value, self.rows[key], count)
                elif source[key] is not value:
                    raise ModelUnsupported(
                        f"layer {number} was handed its own {name!r}, where the probe showed one "
                        "tensor for several layers."
                    )
        for number, value in seen.added.items():
            extras[added_key(number)] = value
        return extras

    def restore(self, key: str, value: Tensor) -> Tensor:
        row = self.rows[key]
        return value[0] if row < 0 else value.movedim(0, row)


def added_key(number: int) -> str:
    """The extra that the model adds to the residual stream after layer `number`."""
    return f"added.{number}@bq_"


def make_plan(one: Capture, small: Sizes, two: Capture, large: Sizes, refusal: str = "") -> Plan:
    """Compare two captures of different sizes; the second has a past unless `refusal` says why not.

    Raises ModelUnsupported for arguments whose layout can not be told.
    """
    names: dict[tuple[int, str], str] = {}
    rows: dict[str, int] = {}
    other = [dict(_named_leaves(handed)[0]) for handed in two.handed]
    groups: dict[str, dict[int, str]] = {}
    for number, handed in enumerate(one.handed):
        for name, value in _named_leaves(handed)[0]:
            if not isinstance(value, Tensor):
                continue
            known = groups.setdefault(name, {})
            if id(value) not in known:
                twin = other[number].get(name)
                if not isinstance(twin, Tensor):
                    raise ModelUnsupported(
                        f"layer {number} must always be handed the same arguments; {name!r} comes "
                        "only sometimes."
                    )
                letters, row = _layout(name, value, small, twin, large)
                mark = f"#{len(known)}" if known else ""
                known[id(value)] = f"{name}{mark}@{letters}"
                rows[known[id(value)]] = row
            names[number, name] = known[id(value)]
    plain = tuple(_template(handed, n, names) for n, handed in enumerate(one.handed))
    cached = None
    if not refusal:
        cached = tuple(_template(handed, n, names) for n, handed in enumerate(two.handed))
        if not all(any(leaf.cache for leaf in template.leaves) for template in cached):
            cached, refusal = None, "its layers are not handed a key-value cache"
    return Plan(plain, cached, names, rows, refusal)


def _template(handed: Handed, number: int, names: Mapping[tuple[int, str], str]) -> Template:
    named, spec = _named_leaves(handed)
    leaves = []
    for name, value in named:
        if isinstance(value, Tensor):
            leaves.append(Leaf(key=names[number, name]) if (number, name) in names else Leaf())
        elif isinstance(value, Ledger):
            leaves.append(Leaf(cache=True))
        else:
            leaves.append(Leaf(value=value))
    return Template(spec, tuple(leaves), handed.named)


def _named_leaves(handed: Handed) -> tuple[list[tuple[str, Any]], Any]:
    flat, spec = pytree.tree_flatten_with_path((list(handed.args), handed.kwargs))
    named = []
    for path, value in flat:
        where, *rest = (str(getattr(part, "key", getattr(part, "idx", part))) for part in path)
        named.append((".".join(rest) if where == "1" else ".".join(["arg", *rest]), value))
    return named, spec


def _layout(name: str, value: Tensor, small: Sizes, twin: Tensor, large: Sizes) -> tuple[str, int]:
    """Letters of the dimensions with rows first, and where the rows were (-1: nowhere)."""
    meaning = {
        (small.rows, large.rows): "b",
        (1, large.rows): "b",  # one table for all rows where positions are not given by row
        (small.query, large.query): "q",
        (small.keys, large.keys): "k",
    }
    letters: list[str] = []
    for pair in zip(value.shape, twin.shape, strict=False):
        letter = "_" if pair[0] == pair[1] else meaning.get(pair, "?")
        # Without a past, queries and keys are as many: the first of two is the queries'.
        if letter == "k" and small.query == small.keys and large.query == large.keys:
            letter = "k" if "q" in letters else "q"
        letters.append(letter)
    if value.ndim != twin.ndim or "?" in letters or letters.count("b") > 1:
        raise ModelUnsupported(
            f"the dimensions of {name!r} must be rows, tokens or fixed; they went from "
            f"{tuple(value.shape)} to {tuple(twin.shape)} for {small} and {large}."
        )
    if "b" in letters:
        row = letters.index("b")
    else:
        tokens = [i for i, letter in enumerate(letters) if letter != "_"]
        before = range(tokens[0] if tokens else 0)
        row = next((i for i in before if value.shape[i] == 1), -1)
    rest = letters if row < 0 else letters[:row] + letters[row + 1 :]
    return "b" + "".join(rest), row


def _rows_first(value: Tensor, row: int, count: int) -> Tensor:
    value = value[None] if row < 0 else value.movedim(row, 0)
    return value if value.shape[0] == count else value.expand(count, *value.shape[1:])
