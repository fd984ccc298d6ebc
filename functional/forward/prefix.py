"""Run everything below the lowest edited layer once, and share it between edits.

    depth = edit_depth(model.card, names)       # where a delta of those parameters acts first
    batch = run_prefix(model, inputs, depth)    # once per row
    logits = run_suffix(bound, batch)           # for every edit, step and probe

`run_suffix(bound, run_prefix(model, x, depth))` equals the whole forward of `bound` on x if no
change of `bound` acts below `depth`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional.card import ModelCard
from errata.functional.header import Header
from errata.functional.types import Batch, Delta, Hooks, Inputs, Model

__all__ = [
    "EditDepth",
    "can_decode_scored",
    "decode_scored",
    "delta_depth",
    "edit_depth",
    "header_depth",
    "lowest_depth",
    "run_prefix",
    "run_suffix",
]


class EditDepth(NamedTuple):
    """The lowest place at which edits act.

    Attributes:
        before_decoder: Whether something before the decoder's layers changes. Then no prefix can be
            shared.
        layer: The lowest layer changed, or the number of layers if none is.
        scored_only: Whether all changes act on single positions after the last attention. Then
            only scored positions matter.
    """

    before_decoder: bool = False
    layer: int = 0
    scored_only: bool = False


def edit_depth(card: ModelCard, names: Iterable[str], *, alone: Iterable[str] = ()) -> EditDepth:
    """Find where changes of parameters, or hooks at modules, act first.

    `scored_only` is True if only the feed-forward part of the last layer, the final norm or the
    head changes. A name outside the layers that is not known to run after them counts as before the
    decoder.

    Args:
        card: Card of the model.
        names: Paths of parameters or modules.
        alone: Those that change one use of a tied parameter and no other.

    Returns:
        The depth. Without names, its layer is the number of layers.
    """
    single = set(alone)
    paths = [
        path for name in names for path in ([name] if name in single else card.all_names(name))
    ]
    if any(card.before_decoder(path) for path in paths):
        return EditDepth(before_decoder=True)
    layers = [card.layer_of(path) for path in paths]
    decoder_layers = [layer for layer in layers if layer is not None]
    lowest = min(decoder_layers, default=card.num_layers)
    last = card.num_layers - 1
    scored_only = all(
        layer is None or (layer == last and _is_position_wise(card, path))
        for layer, path in zip(layers, paths)
    )
    return EditDepth(layer=lowest, scored_only=scored_only)


def lowest_depth(depths: Iterable[EditDepth]) -> EditDepth:
    """Combine the depths of several deltas.

    Args:
        depths: The depths.

    Returns:
        The lowest layer of all. `before_decoder` holds if it holds for any, `scored_only` if for
        all.
    """
    all_depths = list(depths)
    return EditDepth(
        before_decoder=any(depth.before_decoder for depth in all_depths),
        layer=min((one.layer for one in all_depths), default=0),
        scored_only=all(one.scored_only for one in all_depths),
    )


def run_prefix(
    model: Model, source: Inputs | Batch, depth: EditDepth, edit_index: Tensor | None = None
) -> Inputs | Batch:
    """Run the model up to the lowest edited layer, without gradients.

    Rows that `model.prefix_cache` holds are looked up there.

    Args:
        model: The model.
        source: Inputs, or a batch not above `depth`.
        depth: Where the edits act first.
        edit_index: [B], the edit each row will run under. By default all run under edit 0.

    Returns:
        A batch before layer `depth.layer`, or before the last layer if no layer is edited. It holds
        the scored positions only if nothing else matters. If the edits act before the decoder,
        `source` as it is.
    """
    if depth.before_decoder:
        return source
    cached = _lookup_cached(model, source, depth)
    if cached is not None:
        return cached if edit_index is None else cached._replace(edit_index=edit_index)
    with torch.no_grad():
        batch = model.embed(model.params, source) if isinstance(source, Inputs) else source
        layer = min(depth.layer, model.card.num_layers - 1)
        if batch.depth < layer:
            batch = model.decode(model.params, batch, stop=layer)
        if depth.scored_only and layer == model.card.num_layers - 1:
            batch = model.select_scored(model.params, batch)
    return batch if edit_index is None else batch._replace(edit_index=edit_index)


def _lookup_cached(model: Model, source: Inputs | Batch, depth: EditDepth) -> Batch | None:
    cache = model.prefix_cache
    if cache is None or not isinstance(source, Inputs) or not cache.serves(model):
        return None
    last = model.card.num_layers - 1
    layer = min(depth.layer, last)
    return cache.lookup(source, layer, depth.scored_only and layer == last)


def run_suffix(model: Model, source: Inputs | Batch, edit_index: Tensor | None = None) -> Tensor:
    """Run a model from the current depth of the rows to the logits.

    Args:
        model: The model, bound or not.
        source: Inputs, or a batch at any depth.
        edit_index: [B], the edit each row runs under; the source's own by default.

    Returns:
        [B T V], logits at the scored positions.
    """
    if isinstance(source, Inputs):
        source = model.embed(model.params, source, edit_index=edit_index)
    elif edit_index is not None:
        source = source._replace(edit_index=edit_index)
    return model.decode(model.params, source)


def decode_scored(model: Model, batch: Batch, hooks: Hooks | None = None, **options: Any) -> Tensor:
    """Decode to the logits, running the last feed-forward part at scored positions only.

    The attention of the last layer still runs on whole rows. Correct for the changes and hooks that
    `can_decode_scored` allows.

    Args:
        model: The model, bound or not.
        batch: A batch at any depth.
        hooks: Hooks in the decoder.
        **options: Further arguments of `decode`, and of `select_scored` if it runs.

    Returns:
        [B T V], logits at the scored positions.
    """
    given_hooks, last = hooks or {}, model.card.num_layers - 1
    if batch.depth > last or any(key.startswith("attention_output@") for key in batch.layer_inputs):
        return model.decode(model.params, batch, given_hooks, **options)
    if batch.depth < last:
        batch = model.decode(model.params, batch, given_hooks, stop=last, **options)
    batch = model.select_scored(model.params, batch, given_hooks, **options)
    return model.decode(model.params, batch, given_hooks)


def can_decode_scored(card: ModelCard, header: Header) -> bool:
    """Whether a delta leaves the last layer unchanged, or changes only its weights.

    Args:
        card: Card of the model.
        header: Header of the delta.

    Returns:
        Whether `decode_scored` is correct for the delta.
    """
    last = card.num_layers - 1
    for entry in header.entries:
        layer = card.layer_of(card.canonical_name(getattr(entry, "name", "")))
        is_weight_change = entry.is_weight_change()
        if not is_weight_change and (entry.acts_on() != "module" or layer is None or layer >= last):
            return False
    return True


def _is_position_wise(card: ModelCard, path: str) -> bool:
    """Whether a path is in the feed-forward part of a layer, by the card's names.

    Always False if the layer's attention has no name: then it cannot run separately.
    """
    if "attn" not in card.part_names:
        return False
    part = path[len(card.layers) + 1 :].partition(".")[2]
    mlp_names = [
        mlp_name for name, mlp_name in card.part_names.items() if name.partition(".")[0] == "mlp"
    ]
    return any(part == home or part.startswith(f"{home}.") for home in mlp_names)


def header_depth(card: ModelCard, header: Header) -> EditDepth:
    """Find the lowest place at which the entries of a header act.

    Args:
        card: Card of the model.
        header: Header of a delta.

    Returns:
        The depth.
    """
    names = [name for entry in header.entries for name in entry.changed_names(card, header)]
    return edit_depth(card, names, alone=names)


def delta_depth(model: Model, delta: Delta) -> EditDepth:
    """Find the lowest place at which a delta acts.

    Args:
        model: The model.
        delta: The delta.

    Returns:
        The depth.
    """
    acts_on = {entry.acts_on() for entry in delta.header.entries}
    if "prompt" in acts_on:
        return EditDepth(before_decoder=True)
    if "embeddings" in acts_on:
        return EditDepth()
    depth = header_depth(model.card, delta.header)
    needs_all_tokens = any(entry.needs_all_tokens() for entry in delta.header.entries)
    return depth._replace(scored_only=depth.scored_only and not needs_all_tokens)
