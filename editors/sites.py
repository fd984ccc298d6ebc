"""Which parameters a method changes, from the names a user writes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from errata.functional import Model
from errata.functional.errors import UnknownSite

__all__ = ["linears", "parameters"]

_VISION_LAYER = re.compile(r"^vision\.layers\.(-?\d+)(?:\.(.+))?$")


def parameters(model: Model, sites: Sequence[str], *, everything: bool = False) -> tuple[str, ...]:
    """Names of the parameters that `sites` mean, in the model's order.

    A site is anything `ModelCard.match` takes, or `vision.layers.K[.part]` for block K of the
    vision tower; -1 is the last block that the features are read from (LLaVA-1.5 has one above).
    By default only the weights of linear maps are meant; with `everything` every parameter below
    the site is (norms, biases, queries), as fine-tuning a whole module wants.

    Raises UnknownSite naming every site that matches no parameter.

    >>> from errata import adapters
    >>> parameters(adapters.adapt(*adapters.tiny("llava")), ["layers.-1.mlp.down"])
    ('model.language_model.layers.2.mlp.down_proj.weight',)
    """
    if not everything:
        names = {path + ".weight" for path in linears(model, sites)}
    else:
        names = _below(model, sites)
    tied = {name: model.card.ties.get(name, name) for name in names}
    return tuple(name for name in model.params if name in set(tied.values()))


def linears(model: Model, sites: Sequence[str]) -> tuple[str, ...]:
    """Paths of the linear maps that `sites` mean, blocks of the vision tower among them.

    Raises UnknownSite naming every site that matches none.

    >>> from errata import adapters
    >>> linears(adapters.adapt(*adapters.tiny("llava")), ["vision.layers.-1.mlp.fc1"])
    ('model.vision_tower.encoder.layers.0.mlp.fc1',)
    """
    paths, faults = _resolved(model, sites)
    try:
        found = model.card.match(paths)
    except UnknownSite as fault:
        faults.append(str(fault))
        found = ()
    if faults:
        raise UnknownSite(" ".join(faults))
    return found


def _below(model: Model, sites: Sequence[str]) -> set[str]:
    """Every parameter at or below the sites."""
    card = model.card
    paths, faults = _resolved(model, sites)
    names: set[str] = set()
    missing = []
    for site in paths:
        try:
            path = card.site(site)
        except UnknownSite as fault:
            faults.append(str(fault))
            continue
        found = {n for n in model.params if n == path or n.startswith(path + ".")}
        names |= found
        missing += [] if found else [site]
    if missing:
        faults.append(
            f"each site must name parameters of {card.id}; none under "
            f"{', '.join(map(repr, missing))}. Modules: vision={card.vision!r}, "
            f"projector={card.projector!r}, layers={card.layers!r}."
        )
    if faults:
        raise UnknownSite(" ".join(faults))
    return names


def _resolved(model: Model, sites: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sites with vision blocks as full paths, and what is wrong with those that are none."""
    paths, faults = [], []
    for site in sites:
        try:
            paths.append(_vision_layer(model, site))
        except UnknownSite as fault:
            faults.append(str(fault))
    return paths, faults


def _vision_layer(model: Model, site: str) -> str:
    """`vision.layers.K.part` as a full path: the blocks are the tower's numbered modules."""
    found = _VISION_LAYER.match(site)
    if not found:
        return site
    tower = model.card.site("vision")
    blocks: dict[str, set[int]] = {}
    for path in model.card.linears:
        inside = re.match(re.escape(tower) + r"\.(.*?)\.?(\d+)\.", path + ".")
        if inside:
            stem = f"{tower}.{inside[1]}" if inside[1] else tower
            blocks.setdefault(stem, set()).add(int(inside[2]))
    if not blocks:
        raise UnknownSite(f"site {site!r} needs numbered vision blocks; {tower!r} has none.")
    stem, numbers = max(blocks.items(), key=lambda item: len(item[1]))
    last = min(max(numbers), (model.card.vision_depth or len(numbers)) - 1)
    number = int(found[1]) + (last + 1 if found[1].startswith("-") else 0)
    if not 0 <= number <= last:
        unread = last < max(numbers)
        why = f" (the features are read there; later blocks of {model.card.id} change nothing)"
        raise UnknownSite(f"site {site!r} must lie in vision blocks 0 to {last}{why * unread}.")
    return f"{stem}.{number}" + (f".{found[2]}" if found[2] else "")
