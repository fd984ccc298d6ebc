"""The values errata passes around: queries in, batches through, deltas out.

Tensors ride in NamedTuples, which `torch.func` treats as pytrees; settings and headers are frozen
msgspec Structs (`card.py`, `header.py`). Nothing here is ever written in place.

Shape legend, used everywhere: B rows · L tokens of a row (right-padded) · D width · T scored
positions of a row · V vocabulary · P position axes (1, or 3 for M-RoPE) · E edits · N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional.card import ModelCard
from errata.functional.header import Header
from errata.functional.queries import Case, Image, Query

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Case",
    "Delta",
    "Editor",
    "Hook",
    "Hooks",
    "Image",
    "Inputs",
    "KVCache",
    "Model",
    "Params",
    "Query",
    "State",
]

IGNORE_INDEX = -100
"""Label of a position that is not scored."""

Params = Mapping[str, Tensor]
"""Dotted in-memory Hugging Face parameter names to tensors; never written to."""

Hook = Callable[[Tensor, Tensor], Tensor]
"""(module input, module output) -> new output: first positional input, first tensor output."""

Hooks = Mapping[str, Hook]
"""Dotted module path (the full in-memory name) -> rewrite."""

State = Any
"""What an editor remembers between edits: a pytree of tensors, msgspec Structs and plain values."""


class Inputs(NamedTuple):
    """Queries as a processor reads them: token rows, right-padded, and pixels."""

    input_ids: Tensor  # [B L] int64
    attention_mask: Tensor  # [B L] bool, True on real tokens
    image_mask: Tensor  # [B L] bool, True on image or video placeholders
    labels: Tensor  # [B T] int64: the target's token ids, IGNORE behind the last
    logit_positions: (
        Tensor  # [B T] int64: the position whose logits predict labels[b, t]; 0 where ignored
    )
    vision_inputs: Mapping[str, Any] = {}  # what the family's vision path takes, by its own names
    content_ids: tuple[tuple[str, ...], ...] = ()  # content names of each row's images


class Batch(NamedTuple):
    """What the decoder eats at some depth: the residual stream before layer `depth`.

    Every tensor leads with rows, so that rows can be sliced, gathered, concatenated and vmapped.
    `extras` holds what Hugging Face hands its decoder layers (attention masks, rotary tables,
    features added between layers), by names the adapter chose; `edit` says which edit of a stacked
    delta a row runs under.
    """

    hidden_states: Tensor  # [B L D]
    attention_mask: Tensor  # [B L] bool
    position_ids: Tensor  # [B P L] int64
    image_mask: Tensor  # [B L] bool
    prompt_end: Tensor  # [B L] bool, True on a row's last prompt token, where the batch holds it
    labels: Tensor  # [B T] int64
    logit_positions: Tensor  # [B T] int64
    edit_index: Tensor  # [B] int64
    layer_inputs: Mapping[str, Tensor]
    depth: int = 0
    routing: Mapping[
        str, Tensor
    ] = {}  # [B ...] each: what bound deltas decided about a row earlier

    @property
    def num_rows(self) -> int:
        return self.hidden_states.shape[0]


class KVCache(NamedTuple):
    """Keys and values of tokens already decoded: what a cut in time needs to go on."""

    keys: tuple[Tensor, ...]  # per layer [B H S d]
    values: tuple[Tensor, ...]  # per layer [B H S d]
    attention_mask: Tensor  # [B S] bool
    next_position: Tensor  # [B P] int64: the position of the next token
    routing: Mapping[str, Tensor] = {}  # of the batch that was run: see `Batch`


class Delta(NamedTuple):
    """An edit as a value: what changes, and everything needed to apply, inspect and undo it.

    A *stacked* delta (`header.stack == E > 0`) holds E independent edits of the same layout: each
    tensor has a leading edit axis.
    """

    header: Header
    tensors: Mapping[str, Tensor]


class Model(NamedTuple):
    """A vision-language model in functional form: data, and pure functions of `params`.

    read(queries, end=False, edit=None) -> Inputs
        The impure edge: template, tokenizer, image decoding and preprocessing. With `end` the token
        that ends an answer follows each target and is scored with it. `edit` [B] says which edit
        of a stacked delta each row runs under: a base reads the same whatever it says.
    embed(params, inputs, rewrites={}, edit=None) -> Batch
        Vision tower, projector, token embeddings: the batch at depth 0. `edit` [B] says which edit
        of a stacked delta each row runs under (None: all under edit 0).
    decode(params, batch, rewrites={}, *, start=None, stop=None, at=None, past=None, keep=False)
        Layers `batch.depth` (== start, when given) up to `stop`. With `stop` < N a Batch at that
        depth; with `stop` None or N the logits [B T V] at positions `at` (default `batch.at`),
        norm and head run nowhere else. `past` are keys and values of earlier tokens to attend to;
        `keep=True` returns (result, Past) with the keys and values of the layers that were run.
    thin(params, batch, rewrites={}) -> Batch
        For a batch before the last layer: run its attention on whole rows, then keep only the
        scored positions (L becomes T). `decode` of the result gives the same logits; only changes
        to the last layer's position-wise part, the final norm or the head may differ between.
    extend(params, ids, past, rewrites={}, edit=None) -> Batch
        The batch at depth 0 of new token ids [B n] that follow `past`.
    write(ids) -> str
        Detokenise, special tokens dropped.
    """

    card: ModelCard
    params: Params
    preprocess: Callable[..., Inputs]
    embed: Callable[..., Batch]
    decode: Callable[..., Any]
    select_scored: Callable[..., Batch]
    embed_next: Callable[..., Batch]
    detokenize: Callable[[Sequence[int]], str]
    deltas: tuple[Delta, ...] = ()  # what has been bound, lowest first
    prefix_cache: Any = (
        None  # rows this base has run (`known.Known`); nothing but `prefix.cut` asks it
    )


class Editor(NamedTuple):
    """A method of knowledge editing: pure functions made by a factory that closes over settings.

    init(model, generator) -> State
        What a sequence of edits starts from. The generator lives on the CPU.
    edit(model, state, queries) -> (Delta, State)
        Add edits to a state, jointly. `model` is the unedited base; the delta holds *everything*
        the state holds, so that `bind(model, delta)` is the edited model.
    each(model, state, queries) -> Delta
        One independent edit per query, all from `state`, side by side: a stacked delta.
    """

    name: str
    config: Any
    init: Callable[[Model, torch.Generator], State]
    edit: Callable[[Model, State, Sequence[Query]], tuple[Delta, State]]
    edit_each: Callable[[Model, State, Sequence[Query]], Delta]
