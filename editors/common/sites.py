"""The parameters that the site names of a config refer to."""

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
    """List the parameters that site names refer to, in the model's order.

    Args:
        model: The model.
        sites: Names that `ModelCard.resolve_linear` takes, or `vision.layers.K[.part]` for block K
            of the vision tower. -1 is the last block whose features are used (LLaVA-1.5 has one
            more).
        all_parameters: Whether all parameters at or below a site are meant, norms and biases
            included. By default only the weights of linear maps.

    Returns:
        Parameter names. A tied parameter has the name of the one it shares.

    Raises:
        UnknownSiteError: If a site matches no parameter. Lists all such sites.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> resolve_parameters(model, ["layers.-1.mlp.down"])
        ('model.language_model.layers.2.mlp.down_proj.weight',)
    """
    if not all_parameters:
        names = {path + ".weight" for path in resolve_linears(model, sites)}
    else:
        names = _find_parameters(model, sites)
    tied = {name: model.card.tied.get(name, name) for name in names}
    return tuple(name for name in model.params if name in set(tied.values()))


def resolve_linears(model: Model, sites: Sequence[str]) -> tuple[str, ...]:
    """List the paths of the linear maps that site names refer to.

    Args:
        model: The model.
        sites: Site names, as for `resolve_parameters`.

    Returns:
        Module paths.

    Raises:
        UnknownSiteError: If a site matches no linear map. Lists all such sites.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> resolve_linears(model, ["vision.layers.-1.mlp.fc1"])
        ('model.vision_tower.encoder.layers.0.mlp.fc1',)
    """
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
    """Find all parameters at or below the sites."""
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
    """Replace vision blocks by full paths. Also returns one message per invalid site."""
    paths, faults = [], []
    for site in sites:
        try:
            paths.append(_expand_vision_site(model, site))
        except UnknownSiteError as fault:
            faults.append(str(fault))
    return paths, faults


def _expand_vision_site(model: Model, site: str) -> str:
    """Replace `vision.layers.K.part` by a full path. Blocks are the tower's numbered modules."""
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
