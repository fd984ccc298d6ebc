"""The values that errata passes around: queries in, batches through, deltas out.

Tensors ride in NamedTuples, which `torch.func` treats as pytrees. Settings and headers are frozen
msgspec Structs (`card.py`, `header.py`). Nothing here is written in place.

Shape legend, used everywhere: B rows · L tokens of a row (right-padded) · D hidden size · T scored
positions of a row · V vocabulary · P position axes (1, or 3 for M-RoPE) · E edits · N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from errata.functional.card import ModelCard
from errata.functional.errors import UnsupportedModelError
from errata.functional.header import Header
from errata.functional.queries import Case, Image, Query

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Case",
    "Decode",
    "Delta",
    "Detokenize",
    "Editor",
    "Embed",
    "EmbedNext",
    "Hook",
    "Hooks",
    "Image",
    "Inputs",
    "KVCache",
    "Model",
    "Params",
    "PrefixLookup",
    "Preprocess",
    "Query",
    "SelectScored",
    "State",
    "TextEncoder",
]

IGNORE_INDEX = -100
"""Label of a position that is not scored."""

Params = Mapping[str, Tensor]
"""Dotted in-memory Hugging Face parameter names to tensors. Never written to."""

Hook = Callable[[Tensor, Tensor], Tensor]
"""(module input, module output) -> new output: first positional input, first tensor output."""

Hooks = Mapping[str, Hook]
"""Dotted module path (the full in-memory name) to hook."""

State = Any
"""What an editor carries from one edit to the next: a pytree of tensors, msgspec Structs and plain
values."""

TextEncoder = Callable[[Sequence[str]], Tensor]
"""Texts to unit retrieval keys [B d], fp32."""

_NO_HOOKS: Hooks = MappingProxyType({})


class Inputs(NamedTuple):
    """Preprocessed queries: right-padded token rows and vision tensors.

    Attributes:
        input_ids: [B L] int64.
        attention_mask: [B L] bool, True on real tokens.
        image_mask: [B L] bool, True on image or video placeholders.
        labels: [B T] int64, the target's token ids, `IGNORE_INDEX` after the last.
        logit_positions: [B T] int64, the position whose logits predict labels[b, t]. 0 if ignored.
        vision_inputs: Arguments of the family's vision path, by its names.
        content_ids: Content ids of each row's images.
    """

    input_ids: Tensor
    attention_mask: Tensor
    image_mask: Tensor
    labels: Tensor
    logit_positions: Tensor
    vision_inputs: Mapping[str, Any] = {}
    content_ids: tuple[tuple[str, ...], ...] = ()


class Batch(NamedTuple):
    """The residual stream before layer `depth`, with everything the layers above need.

    Every tensor leads with rows, so rows can be sliced, gathered, concatenated and vmapped.

    Attributes:
        hidden_states: [B L D].
        attention_mask: [B L] bool.
        position_ids: [B P L] int64.
        image_mask: [B L] bool.
        prompt_end: [B L] bool, True on a row's last prompt token, if the batch holds it.
        labels: [B T] int64.
        logit_positions: [B T] int64.
        edit_index: [B] int64, the edit of a stacked delta each row runs under. -1: the base.
        layer_inputs: Further arguments of the Hugging Face layers (attention masks, rotary tables,
            features added between layers), by names the adapter chose.
        depth: The number of layers the batch has passed.
        routing: [B ...] each, what bound deltas decided at the end of the prompt.
    """

    hidden_states: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    image_mask: Tensor
    prompt_end: Tensor
    labels: Tensor
    logit_positions: Tensor
    edit_index: Tensor
    layer_inputs: Mapping[str, Tensor]
    depth: int = 0
    routing: Mapping[str, Tensor] = {}

    @property
    def num_rows(self) -> int:
        """The number of rows B."""
        return self.hidden_states.shape[0]


class KVCache(NamedTuple):
    """Keys and values of decoded tokens, for decoding to continue after them.

    Attributes:
        keys: Per layer [B H S d].
        values: Per layer [B H S d].
        attention_mask: [B S] bool.
        next_position: [B P] int64, the position of the next token.
        routing: `Batch.routing` of the batch that was run.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    attention_mask: Tensor
    next_position: Tensor
    routing: Mapping[str, Tensor] = {}


class Delta(NamedTuple):
    """An edit as a value: a header and tensors.

    A *stacked* delta (`header.stack == E > 0`) holds E independent edits of one layout. Each of its
    tensors has a leading edit axis.

    Attributes:
        header: What changes, for which base, made by which editor, for which edits.
        tensors: The tensors that `header.tensor_specs()` names.
    """

    header: Header
    tensors: Mapping[str, Tensor]


class Preprocess(Protocol):
    """Turn queries into inputs: template, tokenizer, image decoding and preprocessing."""

    def __call__(
        self,
        queries: Sequence[Query],
        *,
        append_eos: bool = False,
        edit_index: Tensor | None = None,
    ) -> Inputs:
        """Preprocess queries.

        Args:
            queries: One per row.
            append_eos: Whether the token that ends an answer follows each target and is scored.
            edit_index: [B], the edit of a stacked delta each row runs under. A base ignores it.

        Returns:
            Inputs of B rows.
        """
        ...


class Embed(Protocol):
    """Run vision tower, projector and token embeddings."""

    def __call__(
        self,
        params: Params,
        inputs: Inputs,
        hooks: Hooks = _NO_HOOKS,
        edit_index: Tensor | None = None,
    ) -> Batch:
        """Embed inputs.

        Args:
            params: Parameters of the model.
            inputs: Preprocessed queries.
            hooks: Hooks before the decoder.
            edit_index: [B], the edit each row runs under. None: edit 0.

        Returns:
            The batch at depth 0.
        """
        ...


class Decode(Protocol):
    """Run decoder layers, and norm and head after the last one."""

    @overload
    def __call__(
        self,
        params: Params,
        batch: Batch,
        hooks: Hooks = ...,
        *,
        start: int | None = ...,
        stop: int | None = ...,
        logit_positions: Tensor | str | None = ...,
        kv_cache: KVCache | None = ...,
        return_cache: Literal[False] = ...,
    ) -> Any: ...
    @overload
    def __call__(
        self,
        params: Params,
        batch: Batch,
        hooks: Hooks = ...,
        *,
        start: int | None = ...,
        stop: int | None = ...,
        logit_positions: Tensor | str | None = ...,
        kv_cache: KVCache | None = ...,
        return_cache: bool = ...,
    ) -> Any: ...
    def __call__(
        self,
        params: Params,
        batch: Batch,
        hooks: Hooks = _NO_HOOKS,
        *,
        start: int | None = None,
        stop: int | None = None,
        logit_positions: Tensor | str | None = None,
        kv_cache: KVCache | None = None,
        return_cache: bool = False,
    ) -> Any:
        """Decode a batch.

        Args:
            params: Parameters of the model.
            batch: A batch at depth `start`.
            hooks: Hooks in the decoder.
            start: Checked against `batch.depth`, if given.
            stop: The layer to stop before. None or N: run to the logits.
            logit_positions: [B T], where norm and head run. "all": everywhere. None:
                `batch.logit_positions`.
            kv_cache: Keys and values of earlier tokens to attend to.
            return_cache: Whether to return the keys and values of the layers that were run.

        Returns:
            A Batch at depth `stop`, or logits [B T V]. With `return_cache`, a pair of it and a
            KVCache.
        """
        ...


class SelectScored(Protocol):
    """Reduce a batch before the last layer to its scored positions."""

    def __call__(self, params: Params, batch: Batch, hooks: Hooks = _NO_HOOKS) -> Batch:
        """Run the last layer's attention on whole rows, then keep the scored positions (L = T).

        `decode` of the result gives the same logits. Only changes of the last layer's position-wise
        part, the final norm or the head may be applied between.

        Args:
            params: Parameters of the model.
            batch: A batch at depth N - 1.
            hooks: Hooks in the decoder.

        Returns:
            A batch at depth N - 1 with T positions.
        """
        ...


class EmbedNext(Protocol):
    """Embed tokens that follow a key-value cache."""

    def __call__(
        self,
        params: Params,
        input_ids: Tensor,
        kv_cache: KVCache,
        hooks: Hooks = _NO_HOOKS,
        edit_index: Tensor | None = None,
    ) -> Batch:
        """Embed new tokens.

        Args:
            params: Parameters of the model.
            input_ids: [B n].
            kv_cache: The tokens before.
            hooks: Hooks before the decoder.
            edit_index: [B], the edit each row runs under. None: edit 0.

        Returns:
            The batch at depth 0.
        """
        ...


class Detokenize(Protocol):
    """Turn token ids into text, without special tokens."""

    def __call__(self, ids: Sequence[int], /) -> str:
        """Detokenize the ids of one answer.

        Args:
            ids: Token ids.

        Returns:
            The text.
        """
        ...


class PrefixLookup(Protocol):
    """Hidden states and logits of the base for rows it has already run (`PrefixCache`)."""

    def serves(self, model: Model) -> bool:
        """Whether results of this model are cached here."""
        ...

    def lookup(self, inputs: Inputs, depth: int, scored_only: bool) -> Batch | None:
        """Look up the batch before layer `depth`. None if a row is not cached."""
        ...

    @property
    def generations(self) -> dict[tuple[Any, ...], str]:
        """Texts that the base has generated, by query and length."""
        ...

    def lookup_logits(self, inputs: Inputs) -> Tensor | None:
        """Look up the logits at scored positions [B T V]. None if a row is not cached."""
        ...


def _cannot_encode_images(image: Image) -> bytes:
    raise UnsupportedModelError(
        "this model has no `encode_image`, which a delta that keeps images needs: make it with "
        "`adapters.from_module`."
    )


def _cannot_load_encoders(name: str) -> TextEncoder:
    raise UnsupportedModelError(
        f"this model has no `load_text_encoder`, which the encoder {name!r} needs: make it with "
        "`adapters.from_module`, or use the encoder 'hashed' or 'base'."
    )


class Model(NamedTuple):
    """A vision-language model in functional form: data, and pure functions of `params`.

    Attributes:
        card: Sizes, sites and identity.
        params: Parameters by their in-memory Hugging Face names.
        preprocess: Queries to `Inputs`. The only impure function.
        embed: Inputs to the batch at depth 0.
        decode: A batch to a later depth, or to logits.
        select_scored: A batch before the last layer to its scored positions.
        embed_next: New tokens after a key-value cache to a batch.
        detokenize: Token ids to text.
        encode_image: An image to the bytes of a PNG file, for deltas that keep images.
        load_text_encoder: The name of a sentence encoder to the encoder.
        deltas: The deltas bound so far, the first one lowest.
        prefix_cache: Rows that the base has already run.
    """

    card: ModelCard
    params: Params
    preprocess: Preprocess
    embed: Embed
    decode: Decode
    select_scored: SelectScored
    embed_next: EmbedNext
    detokenize: Detokenize
    encode_image: Callable[[Image], bytes] = _cannot_encode_images
    load_text_encoder: Callable[[str], TextEncoder] = _cannot_load_encoders
    deltas: tuple[Delta, ...] = ()
    prefix_cache: PrefixLookup | None = None


class Editor(NamedTuple):
    """A method of knowledge editing: pure functions made by a factory that closes over settings.

    Attributes:
        name: The method's name.
        config: Its settings.
        init: (model, generator) -> the state that a sequence of edits starts from. The generator
            lives on the CPU.
        edit: (model, state, queries) -> (delta, state). Adds the edits to the state, jointly: a
            batch edit in the sense of MEMIT and of EasyEdit's `batch_edit`. `model` is the unedited
            base. The delta holds everything the state holds, so `bind(model, delta)` is the edited
            model.
        edit_each: (model, state, queries) -> stacked delta. Makes one *independent* edit per query,
            each from `state`, side by side. Row b of a batch runs under edit `edit_index[b]`.
    """

    name: str
    config: Any
    init: Callable[[Model, torch.Generator], State]
    edit: Callable[[Model, State, Sequence[Query]], tuple[Delta, State]]
    edit_each: Callable[[Model, State, Sequence[Query]], Delta]
