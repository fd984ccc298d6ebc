"""Lessons: what an editor is trained on, from prefixes computed once and kept.

A case's questions are read and run up to the lowest edited layer by the base, the case alone; what
the base says to its localities is kept with them. Legend: E cases · B rows · T positions · V words.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import Batch, Case, Model, Query, prefix, rows
from errata.functional.errors import BadInput, UnknownSite

from . import statefile

__all__ = ["Lesson", "Shelf"]


class Lesson(NamedTuple):
    """Cases to be edited side by side, and what to ask each edited model."""

    queries: tuple[Query, ...]
    edit: Batch  # [E ...] one row per case
    asks: Batch  # [B ...] each under the edit it names; localities last
    probe: Tensor  # [B] which of `weights` a row is about
    base: Tensor  # [B' T V] what the base says to the localities
    weights: Mapping[str, float]
    seed: int = 0  # of what a course draws; 0 where it validates


class Rows(NamedTuple):
    """All questions of one case at the cut: the edit's first, then each probe's in order."""

    batch: Batch
    base: Tensor  # [n T V], of the localities


class Shelf:
    """Every case's questions at the cut, computed once; the last used stay in memory."""

    def __init__(
        self, model: Model, sites: Sequence[str], config: Any, end: bool,
        folder: str | Path | None, reach: prefix.Reach | None = None,
    ) -> None:  # fmt: skip
        self._model, self._config, self._end = model, config, end
        self._reach = reach or prefix.reach(model.card, [f"{site}.weight" for site in sites])
        if self._reach.embed:
            raise UnknownSite("training needs sites in decoder layers, and some lie below them.")
        names = [name for name in config.weights if name.endswith("locality")]
        self._names = [n for n in config.weights if n not in names] + names
        self._local = set(names)
        self._kept: OrderedDict[str, Rows] = OrderedDict()
        self._bytes = 0
        self._disk = Path(folder) / "prefixes" if folder and config.disk else None
        self._written = 0
        if self._disk:
            self._disk.mkdir(parents=True, exist_ok=True)
            self._written = sum(file.stat().st_size for file in self._disk.glob("*.safetensors"))

    def lesson(self, cases: Sequence[Case], draws: torch.Generator | None) -> Lesson:
        """Cases side by side; `draws` chooses among a probe's questions (None: the first)."""
        found = [self._rows(case) for case in cases]
        edits, parts, kinds, bases = [], {name: [] for name in self._names}, [], []
        for number, (case, own) in enumerate(zip(cases, found)):
            edits.append(rows.take(own.batch, slice(0, 1)))
            at = 1
            local = 0
            for name in self._names:
                count = 1 if name == "edit" else len(case.probes[name])
                most = min(self._config.asks, count)
                order = range(count) if draws is None else torch.randperm(count, generator=draws)
                chosen = torch.tensor([int(k) for k in order][:most])
                some = rows.take(own.batch, chosen if name == "edit" else chosen + at)
                some = some._replace(edit=torch.full_like(some.edit, number))
                base = own.base[local + chosen] if name in self._local else None
                parts[name].append((some, base))
                at += 0 if name == "edit" else count
                local += count if name in self._local else 0
        batches = []
        for number, name in enumerate(self._names):
            for some, base in parts[name]:
                batches.append(some)
                kinds += [number] * some.rows
                if base is not None:
                    bases.append(base)
        asks = rows.concat(batches)
        device = asks.hidden.device
        return Lesson(
            queries=tuple(case.edit for case in cases),
            edit=rows.concat(edits),
            asks=asks,
            probe=torch.tensor(kinds, device=device),
            base=_padded(bases, asks.labels.shape[1], self._model.card.vocab, device),
            weights={name: self._config.weights[name] for name in self._names},
            seed=0 if draws is None else int(torch.randint(1, 2**62, (), generator=draws)),
        )

    def _rows(self, case: Case) -> Rows:
        key = _key(case, self._model.card.config, self._reach, self._end, self._names)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._from_disk(key) or self._compute(case, key)
        self._kept[key] = made
        self._bytes += _size(made)
        while self._bytes > self._config.memory and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return made

    def _compute(self, case: Case, key: str) -> Rows:
        names = [name for name in self._names if name != "edit"]
        asked = [case.edit, *(query for name in names for query in case.probes[name])]
        local = sum(len(case.probes[name]) for name in names if name in self._local)
        model = self._model
        inputs = model.read(asked, end=True) if self._end else model.read(asked)
        batch = cast(Batch, prefix.cut(model, inputs, self._reach))
        with torch.no_grad():
            last = rows.take(batch, slice(batch.rows - local, batch.rows))
            base = model.decode(model.params, last)
        made = Rows(batch, base.float())
        if self._disk and self._written + _size(made) <= self._config.disk:
            path = self._disk / f"{key}.safetensors"
            tensors = statefile.named(made)
            statefile.keep(path, tensors, {"case": key, "depth": batch.depth})
            self._written += path.stat().st_size
        return made

    def _from_disk(self, key: str) -> Rows | None:
        path = self._disk / f"{key}.safetensors" if self._disk else None
        if path is None or not path.is_file():
            return None
        try:
            said, tensors = statefile.opened(path)
        except BadInput:
            return None  # not whole: computed again
        if said is None or said.get("case") != key:
            return None
        return _unnamed(tensors, int(said["depth"]))


def _unnamed(tensors: Mapping[str, Tensor], depth: int) -> Rows:
    plain = {n.removeprefix("batch/"): t for n, t in tensors.items() if n.startswith("batch/")}
    extras = {n.removeprefix("extras/"): t for n, t in plain.items() if n.startswith("extras/")}
    fields: dict[str, Any] = {n: t for n, t in plain.items() if not n.startswith("extras/")}
    return Rows(Batch(**fields, extras=extras, depth=depth), tensors["base"])


def _padded(bases: Sequence[Tensor], scored: int, vocab: int, device: torch.device) -> Tensor:
    whole = torch.zeros(sum(len(base) for base in bases), scored, vocab, device=device)
    at = 0
    for base in bases:
        whole[at : at + len(base), : base.shape[1]] = base
        at += len(base)
    return whole


def _key(case: Case, *about: Any) -> str:
    return hashlib.sha256(repr((case.id, *about)).encode()).hexdigest()[:24]


def _size(made: Rows) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(made)
               if isinstance(t, Tensor))  # fmt: skip
