"""Cut at the lowest edited place: what lies below it is computed once, by the base, for everyone.

    reach = prefix.reach(model.card, names)         # where a delta of those parameters acts
    batch = prefix.cut(model, inputs, reach)        # once per row
    logits = prefix.finish(bound, batch)            # for every edit, step and probe

`finish(bound, cut(model, x, reach))` is the whole of `bound` on x for every delta within reach.
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
    "lowest_depth",
    "run_prefix",
    "run_suffix",
]


class EditDepth(NamedTuple):
    """The lowest place that edits touch."""

    before_decoder: bool = False  # something before the decoder's layers: no prefix can be shared
    layer: int = 0  # the lowest layer touched; the number of layers where none is
    scored_only: bool = False  # only what acts on single positions, behind the last attention


def edit_depth(card: ModelCard, names: Iterable[str]) -> EditDepth:
    """Where changes of these parameters, or rewrites at these modules, act first.

    `scored` holds where only the feed-forward part of the last layer, the final norm or the head
    are touched: then only scored positions matter. What cannot be told counts as touched early.
    Nothing touched gives a reach behind the last layer.
    """
    paths = [path for name in names for path in card.all_names(name)]
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
    """The reach of several deltas together."""
    all_depths = list(depths)
    return EditDepth(
        before_decoder=any(depth.before_decoder for depth in all_depths),
        layer=min((one.layer for one in all_depths), default=0),
        scored_only=all(one.scored_only for one in all_depths),
    )


def run_prefix(
    model: Model, source: Inputs | Batch, depth: EditDepth, edit_index: Tensor | None = None
) -> Inputs | Batch:
    """Run the model up to the lowest place within reach, without gradients.

    Gives a Batch before layer `reach.layer`, thinned to scored positions where they are all that
    matters. Where the reach begins before the decoder there is nothing to share: Inputs come back
    as they are. `edit` [B] says which edit each row runs under (default: all run under edit 0).
    Rows that `model.known` has are looked up there.
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
    """The logits [B T V] at scored positions, from wherever the rows stand."""
    if isinstance(source, Inputs):
        source = model.embed(model.params, source, edit_index=edit_index)
    elif edit_index is not None:
        source = source._replace(edit_index=edit_index)
    return model.decode(model.params, source)


def decode_scored(model: Model, batch: Batch, hooks: Hooks | None = None, **options: Any) -> Tensor:
    """`model.decode(params, batch, rewrites)`, the last layer position-wise at scored positions.

    The last layer's attention reads whole rows, its feed-forward part runs only where something is
    scored. Right for changes and rewrites that `can_decode_scored` allows; options go to `decode`
    and `select_scored`.
    """
    given_hooks, last = hooks or {}, model.card.num_layers - 1
    if batch.depth > last or any(key.startswith("attention_output@") for key in batch.layer_inputs):
        return model.decode(model.params, batch, given_hooks, **options)
    if batch.depth < last:
        batch = model.decode(model.params, batch, given_hooks, stop=last, **options)
    batch = model.select_scored(model.params, batch, given_hooks, **options)
    return model.decode(model.params, batch, given_hooks)


def can_decode_scored(card: ModelCard, header: Header) -> bool:
    """Whether a delta leaves the last layer alone, or changes it alike at every position."""
    last = card.num_layers - 1
    for entry in header.entries:
        layer = card.layer_of(card.canonical_name(getattr(entry, "name", "")))
        is_weight_change = entry.is_weight_change()
        if not is_weight_change and (entry.acts_on() != "module" or layer is None or layer >= last):
            return False
    return True


def _is_position_wise(card: ModelCard, path: str) -> bool:
    """Whether a place in a layer is in its feed-forward part, by the card's names.

    Never where the layer's attention has no name: then nothing can run it apart.
    """
    if "attn" not in card.part_names:
        return False
    part = path[len(card.layers) + 1 :].partition(".")[2]
    mlp_names = [
        mlp_name for name, mlp_name in card.part_names.items() if name.partition(".")[0] == "mlp"
    ]
    return any(part == home or part.startswith(f"{home}.") for home in mlp_names)


def delta_depth(model: Model, delta: Delta) -> EditDepth:
    """The lowest place a delta acts on."""
    acts_on = {entry.acts_on() for entry in delta.header.entries}
    if "prompt" in acts_on:
        return EditDepth(before_decoder=True)
    if "embeddings" in acts_on:
        return EditDepth()
    depth = edit_depth(model.card, [entry.name for entry in delta.header.entries])
    needs_all_tokens = any(entry.needs_all_tokens() for entry in delta.header.entries)
    return depth._replace(scored_only=depth.scored_only and not needs_all_tokens)
