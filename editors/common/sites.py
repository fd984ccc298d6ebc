"""Which parameters a method changes, from the names a user writes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from errata.functional import Model
from errata.functional.errors import UnknownSiteError

__all__ = ["resolve_linears", "resolve_parameters"]

_VISION_LAYER = re.compile(r"^vision\.layers\.(-?\d+)(?:\.(.+))?$")


def resolve_parameters(
    model: Model, sites: Sequence[str], *, all_parameters: bool = False
) -> tuple[str, ...]:
    """Names of the parameters that `sites` mean, in the model's order.

    A site is anything `ModelCard.match` takes, or `vision.layers.K[.part]` for block K of the
    vision tower; -1 is the last block that the features are read from (LLaVA-1.5 has one above).
    By default only the weights of linear maps are meant; with `everything` every parameter below
    the site is (norms, biases, queries), as fine-tuning a whole module wants.

    Raises UnknownSiteError naming every site that matches no parameter.

    >>> from errata import adapters
    >>> resolve_parameters(adapters.from_module(*adapters.tiny_model("llava")), ["layers.-1.mlp.down"])
    ('model.language_model.layers.2.mlp.down_proj.weight',)
    """  # noqa: E501
    if not all_parameters:
        names = {path + ".weight" for path in resolve_linears(model, sites)}
    else:
        names = _find_parameters(model, sites)
    tied = {name: model.card.tied.get(name, name) for name in names}
    return tuple(name for name in model.params if name in set(tied.values()))


def resolve_linears(model: Model, sites: Sequence[str]) -> tuple[str, ...]:
    """Paths of the linear maps that `sites` mean, blocks of the vision tower among them.

    Raises UnknownSiteError naming every site that matches none.

    >>> from errata import adapters
    >>> resolve_linears(adapters.from_module(*adapters.tiny_model("llava")), ["vision.layers.-1.mlp.fc1"])
    ('model.vision_tower.encoder.layers.0.mlp.fc1',)
    """  # noqa: E501
    paths, faults = _expand_vision_sites(model, sites)
    try:
        linear_paths = model.card.match_linears(paths)
    except UnknownSiteError as fault:
        faults.append(str(fault))
        linear_paths = ()
    if faults:
        raise UnknownSiteError(" ".join(faults))
    return linear_paths


def _find_parameters(model: Model, sites: Sequence[str]) -> set[str]:
    """Every parameter at or below the sites."""
    card = model.card
    paths, faults = _expand_vision_sites(model, sites)
    names: set[str] = set()
    missing = []
    for site in paths:
        try:
            path = card.resolve_site(site)
        except UnknownSiteError as fault:
            faults.append(str(fault))
            continue
        matched_names = {n for n in model.params if n == path or n.startswith(path + ".")}
        names |= matched_names
        missing += [] if matched_names else [site]
    if missing:
        faults.append(
            f"each site must name parameters of {card.id}; none under "
            f"{', '.join(map(repr, missing))}. Modules: vision={card.vision_tower!r}, "
            f"projector={card.projector!r}, layers={card.layers!r}."
        )
    if faults:
        raise UnknownSiteError(" ".join(faults))
    return names


def _expand_vision_sites(model: Model, sites: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sites with vision blocks as full paths, and what is wrong with those that are none."""
    paths, faults = [], []
    for site in sites:
        try:
            paths.append(_expand_vision_site(model, site))
        except UnknownSiteError as fault:
            faults.append(str(fault))
    return paths, faults


def _expand_vision_site(model: Model, site: str) -> str:
    """`vision.layers.K.part` as a full path: the blocks are the tower's numbered modules."""
    site_match = _VISION_LAYER.match(site)
    if not site_match:
        return site
    tower = model.card.resolve_site("vision")
    blocks: dict[str, set[int]] = {}
    for path in model.card.linear_shapes:
        block_match = re.match(re.escape(tower) + r"\.(.*?)\.?(\d+)\.", path + ".")
        if block_match:
            stem = f"{tower}.{block_match[1]}" if block_match[1] else tower
            blocks.setdefault(stem, set()).add(int(block_match[2]))
    if not blocks:
        raise UnknownSiteError(f"site {site!r} needs numbered vision blocks; {tower!r} has none.")
    stem, numbers = max(blocks.items(), key=lambda item: len(item[1]))
    last = min(max(numbers), (model.card.num_vision_layers or len(numbers)) - 1)
    number = int(site_match[1]) + (last + 1 if site_match[1].startswith("-") else 0)
    if not 0 <= number <= last:
        has_unused_blocks = last < max(numbers)
        why = f" (the features are read there; later blocks of {model.card.id} change nothing)"
        raise UnknownSiteError(
            f"site {site!r} must lie in vision blocks 0 to {last}{why * has_unused_blocks}."
        )
    return f"{stem}.{number}" + (f".{site_match[2]}" if site_match[2] else "")
