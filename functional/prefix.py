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

from .card import ModelCard
from .header import Dense, Header, LowRank
from .places import canonical, runs_below, uses
from .types import Batch, Inputs, Model, Rewrites

__all__ = ["Reach", "cut", "finish", "join", "narrow", "narrows", "reach"]


class Reach(NamedTuple):
    """The lowest place that edits touch."""

    embed: bool = False  # something before the decoder's layers: no prefix can be shared
    layer: int = 0  # the lowest layer touched; the number of layers where none is
    scored: bool = False  # only what acts on single positions, behind the last attention


def reach(card: ModelCard, names: Iterable[str]) -> Reach:
    """Where changes of these parameters, or rewrites at these modules, act first.

    `scored` holds where only the feed-forward part of the last layer, the final norm or the head
    are touched: then only scored positions matter. What can not be told counts as touched early.
    Nothing touched gives a reach behind the last layer.
    """
    paths = [path for name in names for path in uses(card, name)]
    if any(runs_below(card, path) for path in paths):
        return Reach(embed=True)
    layers = [card.layer_of(path) for path in paths]
    inside = [layer for layer in layers if layer is not None]
    lowest = min(inside, default=card.num_layers)
    last = card.num_layers - 1
    scored = all(
        layer is None or (layer == last and _pointwise(card, path))
        for layer, path in zip(layers, paths)
    )
    return Reach(layer=lowest, scored=scored)


def join(reaches: Iterable[Reach]) -> Reach:
    """The reach of several deltas together."""
    found = list(reaches)
    return Reach(
        embed=any(one.embed for one in found),
        layer=min((one.layer for one in found), default=0),
        scored=all(one.scored for one in found),
    )


def cut(
    model: Model, source: Inputs | Batch, reach: Reach, edit: Tensor | None = None
) -> Inputs | Batch:
    """Run the model up to the lowest place within reach, without gradients.

    Gives a Batch before layer `reach.layer`, thinned to scored positions where they are all that
    matters. Where the reach begins before the decoder there is nothing to share: Inputs come back
    as they are. `edit` [B] says which edit each row runs under (default: all run under edit 0).
    Rows that `model.known` has are looked up there.
    """
    if reach.embed:
        return source
    found = _known(model, source, reach)
    if found is not None:
        return found if edit is None else found._replace(edit=edit)
    with torch.no_grad():
        if isinstance(source, Inputs):
            source = model.embed(model.params, source)
        depth = min(reach.layer, model.card.num_layers - 1)
        if source.depth < depth:
            source = model.decode(model.params, source, stop=depth)
        if reach.scored and depth == model.card.num_layers - 1:
            source = model.thin(model.params, source)
    return source if edit is None else source._replace(edit=edit)


def _known(model: Model, source: Inputs | Batch, reach: Reach) -> Batch | None:
    known = model.known
    if known is None or not isinstance(source, Inputs) or not known.serves(model):
        return None
    last = model.card.num_layers - 1
    depth = min(reach.layer, last)
    return known.cut(source, depth, reach.scored and depth == last)


def finish(model: Model, source: Inputs | Batch, edit: Tensor | None = None) -> Tensor:
    """The logits [B T V] at scored positions, from wherever the rows stand."""
    if isinstance(source, Inputs):
        source = model.embed(model.params, source, edit=edit)
    elif edit is not None:
        source = source._replace(edit=edit)
    return model.decode(model.params, source)


def narrow(model: Model, batch: Batch, rewrites: Rewrites | None = None, **options: Any) -> Tensor:
    """`model.decode(params, batch, rewrites)`, the last layer position-wise at scored positions.

    The last layer's attention reads whole rows, its feed-forward part runs only where something is
    scored. Right for changes and rewrites that `narrows` allows; options go to `decode` and `thin`.
    """
    more, last = rewrites or {}, model.card.num_layers - 1
    if batch.depth > last or any(key.startswith("attended@") for key in batch.extras):
        return model.decode(model.params, batch, more, **options)
    if batch.depth < last:
        batch = model.decode(model.params, batch, more, stop=last, **options)
    batch = model.thin(model.params, batch, more, **options)
    return model.decode(model.params, batch, more)


def narrows(card: ModelCard, header: Header) -> bool:
    """Whether a delta leaves the last layer alone, or changes it alike at every position."""
    last = card.num_layers - 1
    for entry in header.entries:
        layer = card.layer_of(canonical(card, getattr(entry, "name", "")))
        plain = isinstance(entry, Dense | LowRank)
        if not plain and (entry.begins() != "site" or layer is None or layer >= last):
            return False
    return True


def _pointwise(card: ModelCard, path: str) -> bool:
    """Whether a place in a layer is in its feed-forward part, by the card's names.

    Never where the layer's attention has no name: then nothing can run it apart.
    """
    if "attn" not in card.parts:
        return False
    part = path[len(card.layers) + 1 :].partition(".")[2]
    homes = [home for name, home in card.parts.items() if name.partition(".")[0] == "mlp"]
    return any(part == home or part.startswith(f"{home}.") for home in homes)
