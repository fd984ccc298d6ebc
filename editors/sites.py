"""Which parameters a method changes, from the names a user writes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from errata.functional import Model
from errata.functional.errors import UnknownSite

__all__ = ["parameters"]

_VISION_LAYER = re.compile(r"^vision\.layers\.(-?\d+)(?:\.(.+))?$")


def parameters(model: Model, sites: Sequence[str], *, everything: bool = False) -> tuple[str, ...]:
    """Names of the parameters that `sites` mean, in the model's order.

    A site is anything `ModelCard.match` takes, or `vision.layers.K[.part]` for block K of the
    vision tower. By default only the weights of linear maps are meant; with `everything` every
    parameter below the site is (norms, biases, queries), as fine-tuning a whole module wants.

    Raises UnknownSite for a site that matches no parameter.

    >>> from errata import adapters
    >>> parameters(adapters.adapt(*adapters.tiny("llava")), ["layers.-1.mlp.down"])
    ('model.language_model.layers.2.mlp.down_proj.weight',)
    """
    card = model.card
    names: set[str] = set()
    missing = []
    for site in sites:
        site = _vision_layer(model, site)
        if everything:
            path = card.site(site)
            found = {n for n in model.params if n == path or n.startswith(path + ".")}
            if not found:
                missing.append(site)
            names |= found
        else:
            names |= {path + ".weight" for path in card.match([site])}
    if missing:
        raise UnknownSite(
            f"each site must name parameters of {card.id}; none under "
            f"{', '.join(map(repr, missing))}. Modules: vision={card.vision!r}, "
            f"projector={card.projector!r}, layers={card.layers!r}."
        )
    tied = {name: card.ties.get(name, name) for name in names}
    return tuple(name for name in model.params if name in set(tied.values()))


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
    number = int(found[1]) + (max(numbers) + 1 if found[1].startswith("-") else 0)
    if number not in numbers:
        raise UnknownSite(f"site {site!r} must lie in vision blocks 0 to {max(numbers)}.")
    return f"{stem}.{number}" + (f".{found[2]}" if found[2] else "")
