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

from errata.functional.forward import batches as rows
from errata.functional.queries import Query
from errata.functional.types import IGNORE_INDEX, Batch, Inputs, Model

__all__ = ["CacheBlock", "PrefixCache", "QueryBatch", "row_keys"]


class QueryBatch(NamedTuple):
    """Questions that are run as one batch; those of `ended` are read with the answer's end."""

    queries: tuple[Query, ...]
    append_eos: bool = False


class CacheBlock(NamedTuple):
    """Parts that are run and dropped together, under a number."""

    number: int
    batches: tuple[QueryBatch, ...]


@dataclass
class _CachedBatch:
    """One part that was run."""

    queries: tuple[Query, ...]
    append_eos: bool
    row_indices: dict[bytes, int] = field(default_factory=dict)  # key of a row -> its number
    by_depth: dict[int, Batch] = field(default_factory=dict)  # depth -> whole rows
    scored: Batch | None = None  # before the last layer, scored positions only
    positions: Tensor | None = (
        None  # [B T] the positions that `logits` and `select_scored` hold, -1: none
    )
    logits: Tensor | None = None  # [B T V]


class PrefixCache:
    """A bounded store of rows of one base; `limit` bytes, open pages aside.

    Pages that are not open are dropped, least recently opened first, when the store outgrows
    `limit`. Only rows of open pages are served, so what is found never hangs on what happened to
    be left from before.
    """

    def __init__(self, model: Model, max_bytes: int = 1 << 30) -> None:
        self._model = model._replace(prefix_cache=None)
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[int, list[_CachedBatch]] = OrderedDict()
        self._loaded: list[_CachedBatch] = []
        self._loaded_numbers: set[int] = set()
        self._requested: set[tuple[int, bool]] = set()  # (depth, thinned) that someone asked for
        self.num_rows_run = 0  # rows run from the beginning
        self.generations: dict[
            Hashable, str
        ] = {}  # what the base says when left to talk: by who asked

    def serves(self, model: Model) -> bool:
        """Whether a model is the base that was run: bound deltas bring parameters of their own."""
        return bool(self._loaded) and model.params is self._model.params and not model.deltas

    def request_depth(self, depth: int, scored_only: bool) -> None:
        """Rows will be asked for at this depth: keep them there when they are run."""
        self._requested.add((depth, scored_only))

    def load(self, blocks: Sequence[CacheBlock]) -> None:
        """Serve the rows of these pages, and run those that are not here."""
        self._loaded, self._loaded_numbers = [], {page.number for page in blocks}
        for block in blocks:
            if block.number not in self._blocks:
                self._evict()
                self._blocks[block.number] = [
                    self._run_batch(query_batch)
                    for query_batch in block.batches
                    for query_batch in _nonempty(query_batch)
                ]
            self._blocks.move_to_end(block.number)
            self._loaded += self._blocks[block.number]
        self._evict()

    def clear(self) -> None:
        """Forget every row."""
        self._blocks.clear()
        self._loaded, self._loaded_numbers = [], set()

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows that are kept."""
        storages: dict[int, int] = {}
        for block in self._blocks.values():
            for cached in block:
                for tensor in _cached_tensors(cached):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def lookup(self, inputs: Inputs, depth: int, scored_only: bool) -> Batch | None:
        """The rows before layer `depth`, thinned if asked; None where one of them is not known."""
        matches = self._find_rows(inputs)
        if matches is None:
            return None
        cached_batches = [
            (part, self._at_depth(part, depth, scored_only), mine) for part, mine in matches
        ]
        if not all(part.scored is batch and scored_only for part, batch, _ in cached_batches):
            scored_only = False  # a family whose last layer cannot be thinned: whole rows
        batches = []
        for cached, batch, row_pairs in cached_batches:
            row_indices, _ = _split_pairs(row_pairs, batch.hidden_states.device)
            selected = rows.take_rows(batch, row_indices)
            if scored_only:
                index = _scored_index(cached, row_pairs, inputs)
                if index is None:
                    return None
                selected = rows.resize_keys(
                    rows.gather_tokens(selected, index), inputs.input_ids.shape[1]
                )
            else:
                selected = rows.trim_batch(
                    selected, min(selected.hidden_states.shape[1], inputs.input_ids.shape[1])
                )
            batches.append(_without_labels(selected))
        joined = batches[0] if len(batches) == 1 else rows.concat_batches(batches)
        order = torch.tensor([row for _, _, mine in cached_batches for row, _ in mine])
        if order.tolist() != list(range(len(order))):
            joined = rows.take_rows(joined, order.argsort().to(joined.hidden_states.device))
        return self._with_labels(joined, inputs, scored_only)

    def lookup_logits(self, inputs: Inputs) -> Tensor | None:
        """The base's logits [B T V] at the rows' scored positions; None where one is not known."""
        matches = self._find_rows(inputs)
        if matches is None:
            return None
        num_labels = inputs.labels.shape[1]
        logits: Tensor | None = None
        for cached, row_pairs in matches:
            index = _scored_index(cached, row_pairs, inputs)
            if index is None or cached.logits is None:
                return None
            if logits is None:
                logits = cached.logits.new_zeros(
                    len(inputs.input_ids), num_labels, cached.logits.shape[-1]
                )
            row_indices, input_rows = _split_pairs(row_pairs, cached.logits.device)
            selected = cached.logits[row_indices].gather(
                1, index[..., None].expand(-1, -1, cached.logits.shape[-1])
            )
            logits[input_rows] = selected
        return logits

    def _find_rows(self, inputs: Inputs) -> list[tuple[_CachedBatch, list[tuple[int, int]]]] | None:
        """For each part that is needed, (row of the inputs, row of the part)."""
        keys = row_keys(inputs)
        if keys is None:
            return None
        matches: dict[int, tuple[_CachedBatch, list[tuple[int, int]]]] = {}
        for row, key in enumerate(keys):
            cached = next((part for part in self._loaded if key in part.row_indices), None)
            if cached is None:
                return None
            matches.setdefault(id(cached), (cached, []))[1].append((row, cached.row_indices[key]))
        return list(matches.values())

    def _run_batch(self, query_batch: QueryBatch) -> _CachedBatch:
        model = self._model
        inputs = (
            model.preprocess(query_batch.queries, append_eos=True)
            if query_batch.append_eos
            else model.preprocess(query_batch.queries)
        )
        cached = _CachedBatch(query_batch.queries, query_batch.append_eos)
        for number, key in enumerate(row_keys(inputs) or ()):
            cached.row_indices.setdefault(key, number)
        if query_batch.append_eos:  # the same rows without the end are their beginnings
            without_eos = model.preprocess(query_batch.queries)
            for number, key in enumerate(row_keys(without_eos) or ()):
                size = int(without_eos.attention_mask[number].sum())
                if torch.equal(
                    without_eos.input_ids[number, :size], inputs.input_ids[number, :size]
                ):
                    cached.row_indices.setdefault(key, number)
        last = model.card.num_layers - 1
        depths = sorted(
            {depth for depth, scored_only in self._requested if not scored_only} - {last}
        )
        with torch.no_grad():
            batch = model.embed(model.params, inputs)
            self.num_rows_run += batch.num_rows
            cached.positions = torch.where(batch.labels != IGNORE_INDEX, batch.logit_positions, -1)
            for depth in depths:
                batch = model.decode(model.params, batch, stop=depth) if depth else batch
                cached.by_depth[depth] = batch
            self._run_last_layers(cached, batch)
        return cached

    def _run_last_layers(self, cached: _CachedBatch, batch: Batch) -> None:
        """The last layers, and the answers."""
        model, last = self._model, self._model.card.num_layers - 1
        if batch.depth < last:
            batch = model.decode(model.params, batch, stop=last)
        scored = model.select_scored(model.params, batch)
        cached.logits = model.decode(model.params, scored)
        if (last, False) in self._requested or scored is batch:
            cached.by_depth[last] = batch
        if (last, True) in self._requested and scored is not batch:
            cached.scored = scored

    def _at_depth(self, cached: _CachedBatch, depth: int, scored_only: bool) -> Batch:
        """A part at a depth, run on from the nearest one below where nobody had asked before."""
        model, last = self._model, self._model.card.num_layers - 1
        self.request_depth(depth, scored_only)
        scored_only = scored_only and depth == last
        if scored_only and cached.scored is not None:
            return cached.scored
        if depth in cached.by_depth and not scored_only:
            return cached.by_depth[depth]
        with torch.no_grad():
            below = max((d for d in cached.by_depth if d <= depth), default=None)
            if below is None:
                inputs = (
                    model.preprocess(cached.queries, append_eos=True) if cached.append_eos else None
                )
                batch = model.embed(model.params, inputs or model.preprocess(cached.queries))
                self.num_rows_run += batch.num_rows
            else:
                batch = cached.by_depth[below]
            if batch.depth < depth:
                batch = model.decode(model.params, batch, stop=depth)
            if not scored_only:
                cached.by_depth[depth] = batch
                return batch
            scored = model.select_scored(model.params, batch)
            if scored is batch:
                cached.by_depth[depth] = batch
            else:
                cached.scored = scored
        return scored

    def _with_labels(self, batch: Batch, inputs: Inputs, scored_only: bool) -> Batch:
        """The batch with the labels of who asks, who may have read more or less of the answer."""
        device = batch.hidden_states.device
        labels, logit_positions = inputs.labels.to(device), inputs.logit_positions.to(device)
        batch = batch._replace(labels=labels, edit_index=torch.zeros_like(labels[:, 0]))
        prompt_end = rows.prompt_end_mask(inputs).to(device)
        if scored_only:
            positions = torch.arange(logit_positions.shape[1], device=device).expand_as(
                logit_positions
            )
            return batch._replace(
                logit_positions=positions, prompt_end=prompt_end.gather(1, logit_positions)
            )
        attention_mask, image_mask = inputs.attention_mask.to(device), inputs.image_mask.to(device)
        return batch._replace(
            logit_positions=logit_positions,
            prompt_end=prompt_end,
            attention_mask=attention_mask,
            image_mask=image_mask,
        )

    def _evict(self) -> None:
        evictable = [name for name in self._blocks if name not in self._loaded_numbers]
        while evictable and self.num_bytes > self._max_bytes:
            del self._blocks[evictable.pop(0)]


def row_keys(inputs: Inputs) -> list[bytes] | None:
    """What makes rows the same to a decoder: tokens, and pictures by content, where they stand.

    None where the pictures of a row have no names.
    """
    if inputs.vision_inputs and not any(inputs.content_ids):
        return None
    sizes = inputs.attention_mask.sum(-1).tolist()
    content_ids = inputs.content_ids or ((),) * len(sizes)
    input_ids, image_mask = inputs.input_ids.cpu().numpy(), inputs.image_mask.cpu().numpy()
    return [
        b"|".join(
            [
                input_ids[row, :size].tobytes(),
                image_mask[row, :size].tobytes(),
                *map(str.encode, content_ids[row]),
            ]
        )
        for row, size in enumerate(sizes)
    ]


def _nonempty(query_batch: QueryBatch) -> list[QueryBatch]:
    return [query_batch] if query_batch.queries else []


def _split_pairs(row_pairs: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the part, and the rows of the inputs that they are for."""
    row_indices = torch.tensor([number for _, number in row_pairs], device=device)
    return row_indices, torch.tensor([row for row, _ in row_pairs], device=device)


def _scored_index(
    cached: _CachedBatch, row_pairs: list[tuple[int, int]], inputs: Inputs
) -> Tensor | None:
    """[b T] which of the part's scored positions each of the rows' is; None where one is not."""
    assert cached.positions is not None
    row_indices, input_rows = _split_pairs(row_pairs, cached.positions.device)
    positions = cached.positions[row_indices]  # [b S]
    logit_positions, labels = (
        inputs.logit_positions.to(positions.device)[input_rows],
        inputs.labels.to(positions.device)[input_rows],
    )
    same = logit_positions[:, :, None] == positions[:, None]  # [b T S]
    if not bool((same.any(-1) | (labels == IGNORE_INDEX)).all()):
        return None
    return same.int().argmax(-1)


def _without_labels(batch: Batch) -> Batch:
    """Without labels: rows of parts that score different numbers of positions can be joined."""
    return batch._replace(labels=batch.labels[:, :0], logit_positions=batch.logit_positions[:, :0])


def _cached_tensors(cached: _CachedBatch) -> list[Tensor]:
    tensors: list[Any] = [cached.positions, cached.logits]
    for batch in (*cached.by_depth.values(), cached.scored):
        if batch is not None:
            tensors += [batch.hidden_states, *batch.layer_inputs.values()]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
