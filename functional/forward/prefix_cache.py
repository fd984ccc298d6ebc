"""Cache of rows that the base has run: hidden states at some depths, and logits.

    cache = PrefixCache(model)
    model = model._replace(prefix_cache=cache)
    cache.load([CacheBlock(0, batches)])       # run once; `run_prefix` then looks up

All editors, probes and edits of the same questions share one pass of the base. Rows run in
*blocks* of batches that depend on the questions only. A result therefore has the same bits
for every caller, and a resumed run writes the same bytes as one that was not interrupted.

A row is identified by its tokens and the content of its images. A row that is a prefix of another
(the same question without the final answer token) is served from the longer one, because attention
is causal. Legend: B rows · L tokens · T scored positions · V vocabulary.
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
    """Queries that run as one batch.

    Attributes:
        queries: One per row.
        append_eos: Whether the token that ends an answer follows each target.
    """

    queries: tuple[Query, ...]
    append_eos: bool = False


class CacheBlock(NamedTuple):
    """Batches that are run and dropped together.

    Attributes:
        number: Identity of the block.
        batches: The batches.
    """

    number: int
    batches: tuple[QueryBatch, ...]


@dataclass
class _CachedBatch:
    """One batch that was run.

    Attributes:
        queries: One per row.
        append_eos: Whether the token that ends an answer follows each target.
        row_indices: Key of a row -> its number.
        by_depth: Depth -> whole rows.
        scored: Before the last layer, scored positions only.
        positions: [B T], the positions in `logits` and `scored`, -1 for none.
        logits: [B T V].
    """

    queries: tuple[Query, ...]
    append_eos: bool
    row_indices: dict[bytes, int] = field(default_factory=dict)
    by_depth: dict[int, Batch] = field(default_factory=dict)
    scored: Batch | None = None
    positions: Tensor | None = None
    logits: Tensor | None = None


class PrefixCache:
    """A bounded cache of rows of one base.

    If the cache exceeds `max_bytes`, blocks that are not loaded are dropped, the least recently
    loaded first; loaded blocks may exceed it. Only rows of loaded blocks are served, so a result
    never depends on earlier blocks that happen to be in memory.
    """

    def __init__(self, model: Model, max_bytes: int = 1 << 30) -> None:
        self._model = model._replace(prefix_cache=None)
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[int, list[_CachedBatch]] = OrderedDict()
        self._loaded: list[_CachedBatch] = []
        self._loaded_numbers: set[int] = set()
        self._requested: set[tuple[int, bool]] = set()  # (depth, scored_only) of earlier look-ups
        self.num_rows_run = 0  # rows run from the beginning
        self.generations: dict[Hashable, str] = {}  # texts that the base has generated

    def serves(self, model: Model) -> bool:
        """Whether results of a model are cached here: it must be the base, without deltas.

        Args:
            model: The model.

        Returns:
            False if no block is loaded, too.
        """
        return bool(self._loaded) and model.params is self._model.params and not model.deltas

    def request_depth(self, depth: int, scored_only: bool) -> None:
        """Request that rows are kept at a depth when they run.

        Args:
            depth: Layers that the rows have passed.
            scored_only: Whether scored positions are enough. Used before the last layer only.
        """
        self._requested.add((depth, scored_only))

    def load(self, blocks: Sequence[CacheBlock]) -> None:
        """Serve the rows of these blocks only, and run the blocks that are not in memory.

        Args:
            blocks: The blocks.
        """
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
        """Drop every row."""
        self._blocks.clear()
        self._loaded, self._loaded_numbers = [], set()

    @property
    def num_bytes(self) -> int:
        """Bytes of the cached rows."""
        storages: dict[int, int] = {}
        for block in self._blocks.values():
            for cached in block:
                for tensor in _cached_tensors(cached):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def lookup(self, inputs: Inputs, depth: int, scored_only: bool) -> Batch | None:
        """Look up rows before a layer.

        Args:
            inputs: The rows.
            depth: The layer.
            scored_only: Whether scored positions are enough, before the last layer.

        Returns:
            The batch with the labels of `inputs`, or None if a row or a scored position is not
            cached.
        """
        matches = self._find_rows(inputs)
        if matches is None:
            return None
        cached_batches = [
            (part, self._at_depth(part, depth, scored_only), mine) for part, mine in matches
        ]
        if not all(part.scored is batch and scored_only for part, batch, _ in cached_batches):
            scored_only = False  # a family without `select_scored` keeps whole rows
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
        order = torch.tensor(
            [row for _, _, mine in cached_batches for row, _ in mine],
            dtype=torch.int64,
            device="cpu",
        )
        if order.tolist() != list(range(len(order))):
            joined = rows.take_rows(joined, order.argsort().to(joined.hidden_states.device))
        return self._with_labels(joined, inputs, scored_only)

    def lookup_logits(self, inputs: Inputs) -> Tensor | None:
        """Look up the base's logits at the scored positions.

        Args:
            inputs: The rows.

        Returns:
            [B T V], or None if a row or a scored position is not cached.
        """
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
        """Return each cached batch needed, with (row of the inputs, row of the batch) pairs."""
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
        if query_batch.append_eos:  # rows without the end token are beginnings of these
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
        """Run the last layers, and keep the logits and the requested depths."""
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
        """Return a batch at a depth, run from the nearest cached depth below if necessary."""
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
        """Set the labels of `inputs`, which may be longer or shorter than the cached ones."""
        device = batch.hidden_states.device
        labels, logit_positions = inputs.labels.to(device), inputs.logit_positions.to(device)
        batch = batch._replace(labels=labels, edit_index=torch.zeros_like(labels[:, 0]))
        prompt_end = rows.prompt_end_mask(inputs).to(device)
        if scored_only:
            positions = torch.arange(
                logit_positions.shape[1], device=device, dtype=torch.int64
            ).expand_as(logit_positions)
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
    """Return a key per row that is equal for rows the decoder cannot tell apart.

    It contains the tokens, the positions of images and their content ids.

    Args:
        inputs: The rows.

    Returns:
        One key per row, or None if there are images without content ids.
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
    """Return the rows of the cached batch, and the rows of the inputs that they are for."""
    row_indices = torch.tensor(
        [number for _, number in row_pairs], device=device, dtype=torch.int64
    )
    return row_indices, torch.tensor(
        [row for row, _ in row_pairs], device=device, dtype=torch.int64
    )


def _scored_index(
    cached: _CachedBatch, row_pairs: list[tuple[int, int]], inputs: Inputs
) -> Tensor | None:
    """Find each scored position [b T] among those of a cached batch; None if one is missing."""
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
    """Drop the labels, so that batches of different label counts can be concatenated."""
    return batch._replace(labels=batch.labels[:, :0], logit_positions=batch.logit_positions[:, :0])


def _cached_tensors(cached: _CachedBatch) -> list[Tensor]:
    tensors: list[Any] = [cached.positions, cached.logits]
    for batch in (*cached.by_depth.values(), cached.scored):
        if batch is not None:
            tensors += [batch.hidden_states, *batch.layer_inputs.values()]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
