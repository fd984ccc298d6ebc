"""Rows that the base has run: where they stood at each cut, and what it answered.

    known = Known(model)
    model = model._replace(known=known)
    known.open([Page(0, parts)])                  # run once; `prefix.cut` and `said` are look-ups

All editors, all probes and all edits of the same questions then share one pass of the base. Rows
are run in *pages*, batches that follow from the questions alone: what is looked up has the same
bits whoever asked first, so that a run that was killed ends with the bytes of one that was not.

A row is known by its tokens and the content of its pictures; a row that is the beginning of another
(the same question without the token that ends the answer) is served by the longer one, because
attention is causal. Legend: B rows · L tokens · T scored positions · V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rows
from .queries import Query
from .types import IGNORE, Batch, Inputs, Model

__all__ = ["Known", "Page", "Part", "row_keys"]


class Part(NamedTuple):
    """Questions that are run as one batch; those of `ended` are read with the answer's end."""

    queries: tuple[Query, ...]
    ended: bool = False


class Page(NamedTuple):
    """Parts that are run and dropped together, under a number."""

    name: int
    parts: tuple[Part, ...]


@dataclass
class _Stood:
    """One part that was run."""

    queries: tuple[Query, ...]
    ended: bool
    places: dict[bytes, int] = field(default_factory=dict)  # key of a row -> its number
    at: dict[int, Batch] = field(default_factory=dict)  # depth -> whole rows
    thin: Batch | None = None  # before the last layer, scored positions only
    where: Tensor | None = None  # [B T] the positions that `logits` and `thin` hold, -1: none
    logits: Tensor | None = None  # [B T V]


class Known:
    """A bounded store of rows of one base; `limit` bytes, open pages aside.

    Pages that are not open are dropped, least recently opened first, when the store outgrows
    `limit`. Only rows of open pages are served, so what is found never hangs on what happened to
    be left from before.
    """

    def __init__(self, model: Model, limit: int = 1 << 30) -> None:
        self._model = model._replace(known=None)
        self._limit = limit
        self._pages: OrderedDict[int, list[_Stood]] = OrderedDict()
        self._open: list[_Stood] = []
        self._names: set[int] = set()
        self._wanted: set[tuple[int, bool]] = set()  # (depth, thinned) that someone asked for
        self.passes = 0  # rows run from the beginning
        self.texts: dict[Hashable, str] = {}  # what the base says when left to talk: by who asked

    def serves(self, model: Model) -> bool:
        """Whether a model is the base that was run: bound deltas bring parameters of their own."""
        return bool(self._open) and model.params is self._model.params and not model.deltas

    def expect(self, depth: int, thinned: bool) -> None:
        """Rows will be asked for at this depth: keep them there when they are run."""
        self._wanted.add((depth, thinned))

    def open(self, pages: Sequence[Page]) -> None:
        """Serve the rows of these pages, and run those that are not here."""
        self._open, self._names = [], {page.name for page in pages}
        for page in pages:
            if page.name not in self._pages:
                self._trim()
                self._pages[page.name] = [
                    self._run(part) for part in page.parts for part in _readable(part)
                ]
            self._pages.move_to_end(page.name)
            self._open += self._pages[page.name]
        self._trim()

    def drop(self) -> None:
        """Forget every row."""
        self._pages.clear()
        self._open, self._names = [], set()

    @property
    def held(self) -> int:
        """Bytes of the rows that are kept."""
        seen: dict[int, int] = {}
        for page in self._pages.values():
            for part in page:
                for tensor in _tensors(part):
                    storage = tensor.untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def cut(self, inputs: Inputs, depth: int, thinned: bool) -> Batch | None:
        """The rows before layer `depth`, thinned if asked; None where one of them is not known."""
        found = self._find(inputs)
        if found is None:
            return None
        parts = [(part, self._at(part, depth, thinned), mine) for part, mine in found]
        if not all(part.thin is batch and thinned for part, batch, _ in parts):
            thinned = False  # a family whose last layer can not be thinned: whole rows
        taken = []
        for part, batch, mine in parts:
            numbers, _ = _split(mine, batch.hidden.device)
            some = rows.take(batch, numbers)
            if thinned:
                index = _index(part, mine, inputs)
                if index is None:
                    return None
                some = rows.keyed(rows.pick(some, index), inputs.ids.shape[1])
            else:
                some = rows.trim(some, min(some.hidden.shape[1], inputs.ids.shape[1]))
            taken.append(_bare(some))
        joined = taken[0] if len(taken) == 1 else rows.concat(taken)
        order = torch.tensor([row for _, _, mine in parts for row, _ in mine])
        if order.tolist() != list(range(len(order))):
            joined = rows.take(joined, order.argsort().to(joined.hidden.device))
        return self._labelled(joined, inputs, thinned)

    def said(self, inputs: Inputs) -> Tensor | None:
        """The base's logits [B T V] at the rows' scored positions; None where one is not known."""
        found = self._find(inputs)
        if found is None:
            return None
        width = inputs.labels.shape[1]
        made: Tensor | None = None
        for part, mine in found:
            index = _index(part, mine, inputs)
            if index is None or part.logits is None:
                return None
            if made is None:
                made = part.logits.new_zeros(len(inputs.ids), width, part.logits.shape[-1])
            numbers, own = _split(mine, part.logits.device)
            few = part.logits[numbers].gather(
                1, index[..., None].expand(-1, -1, part.logits.shape[-1])
            )
            made[own] = few
        return made

    def _find(self, inputs: Inputs) -> list[tuple[_Stood, list[tuple[int, int]]]] | None:
        """For each part that is needed, (row of the inputs, row of the part)."""
        keys = row_keys(inputs)
        if keys is None:
            return None
        found: dict[int, tuple[_Stood, list[tuple[int, int]]]] = {}
        for row, key in enumerate(keys):
            part = next((part for part in self._open if key in part.places), None)
            if part is None:
                return None
            found.setdefault(id(part), (part, []))[1].append((row, part.places[key]))
        return list(found.values())

    def _run(self, part: Part) -> _Stood:
        model = self._model
        inputs = model.read(part.queries, end=True) if part.ended else model.read(part.queries)
        made = _Stood(part.queries, part.ended)
        for number, key in enumerate(row_keys(inputs) or ()):
            made.places.setdefault(key, number)
        if part.ended:  # the same rows without the end are their beginnings
            plain = model.read(part.queries)
            for number, key in enumerate(row_keys(plain) or ()):
                size = int(plain.mask[number].sum())
                if torch.equal(plain.ids[number, :size], inputs.ids[number, :size]):
                    made.places.setdefault(key, number)
        last = model.card.num_layers - 1
        wanted = sorted({depth for depth, thinned in self._wanted if not thinned} - {last})
        with torch.no_grad():
            batch = model.embed(model.params, inputs)
            self.passes += batch.rows
            made.where = torch.where(batch.labels != IGNORE, batch.at, -1)
            for depth in wanted:
                batch = model.decode(model.params, batch, stop=depth) if depth else batch
                made.at[depth] = batch
            self._finish(made, batch)
        return made

    def _finish(self, part: _Stood, batch: Batch) -> None:
        """The last layers, and the answers."""
        model, last = self._model, self._model.card.num_layers - 1
        if batch.depth < last:
            batch = model.decode(model.params, batch, stop=last)
        thin = model.thin(model.params, batch)
        part.logits = model.decode(model.params, thin)
        if (last, False) in self._wanted or thin is batch:
            part.at[last] = batch
        if (last, True) in self._wanted and thin is not batch:
            part.thin = thin

    def _at(self, part: _Stood, depth: int, thinned: bool) -> Batch:
        """A part at a depth, run on from the nearest one below where nobody had asked before."""
        model, last = self._model, self._model.card.num_layers - 1
        self.expect(depth, thinned)
        thinned = thinned and depth == last
        if thinned and part.thin is not None:
            return part.thin
        if depth in part.at and not thinned:
            return part.at[depth]
        with torch.no_grad():
            below = max((d for d in part.at if d <= depth), default=None)
            if below is None:
                read = model.read(part.queries, end=True) if part.ended else None
                batch = model.embed(model.params, read or model.read(part.queries))
                self.passes += batch.rows
            else:
                batch = part.at[below]
            if batch.depth < depth:
                batch = model.decode(model.params, batch, stop=depth)
            if not thinned:
                part.at[depth] = batch
                return batch
            thin = model.thin(model.params, batch)
            if thin is batch:
                part.at[depth] = batch
            else:
                part.thin = thin
        return thin

    def _labelled(self, batch: Batch, inputs: Inputs, thinned: bool) -> Batch:
        """The batch with the labels of who asks, who may have read more or less of the answer."""
        device = batch.hidden.device
        labels, at = inputs.labels.to(device), inputs.at.to(device)
        batch = batch._replace(labels=labels, edit=torch.zeros_like(labels[:, 0]))
        end = rows.ends(inputs).to(device)
        if thinned:
            places = torch.arange(at.shape[1], device=device).expand_as(at)
            return batch._replace(at=places, prompt=end.gather(1, at))
        mask, image = inputs.mask.to(device), inputs.image.to(device)
        return batch._replace(at=at, prompt=end, mask=mask, image=image)

    def _trim(self) -> None:
        idle = [name for name in self._pages if name not in self._names]
        while idle and self.held > self._limit:
            del self._pages[idle.pop(0)]


def row_keys(inputs: Inputs) -> list[bytes] | None:
    """What makes rows the same to a decoder: tokens, and pictures by content, where they stand.

    None where the pictures of a row have no names.
    """
    if inputs.pixels and not any(inputs.keys):
        return None
    sizes = inputs.mask.sum(-1).tolist()
    names = inputs.keys or ((),) * len(sizes)
    ids, image = inputs.ids.cpu().numpy(), inputs.image.cpu().numpy()
    return [
        b"|".join([
            ids[row, :size].tobytes(), image[row, :size].tobytes(), *map(str.encode, names[row])
        ])
        for row, size in enumerate(sizes)
    ]  # fmt: skip


def _readable(part: Part) -> list[Part]:
    return [part] if part.queries else []


def _split(mine: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the part, and the rows of the inputs that they are for."""
    numbers = torch.tensor([number for _, number in mine], device=device)
    return numbers, torch.tensor([row for row, _ in mine], device=device)


def _index(part: _Stood, mine: list[tuple[int, int]], inputs: Inputs) -> Tensor | None:
    """[b T] which of the part's scored positions each of the rows' is; None where one is not."""
    assert part.where is not None
    numbers, own = _split(mine, part.where.device)
    where = part.where[numbers]  # [b S]
    at, labels = inputs.at.to(where.device)[own], inputs.labels.to(where.device)[own]
    same = at[:, :, None] == where[:, None]  # [b T S]
    if not bool((same.any(-1) | (labels == IGNORE)).all()):
        return None
    return same.int().argmax(-1)


def _bare(batch: Batch) -> Batch:
    """Without labels: rows of parts that score different numbers of positions can be joined."""
    return batch._replace(labels=batch.labels[:, :0], at=batch.at[:, :0])


def _tensors(part: _Stood) -> list[Tensor]:
    found: list[Any] = [part.where, part.logits]
    for batch in (*part.at.values(), part.thin):
        if batch is not None:
            found += [batch.hidden, *batch.extras.values()]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
