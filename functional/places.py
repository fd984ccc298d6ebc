"""Where a parameter is used: its names, and whether it runs before the decoder or in it."""

from __future__ import annotations

from .card import ModelCard

__all__ = ["canonical_name", "module_path", "in_decoder", "before_decoder", "all_names"]


def canonical_name(card: ModelCard, name: str) -> str:
    """The name under which a model's `params` hold a parameter: its own, unless it is tied."""
    return card.tied.get(name, name)


def all_names(card: ModelCard, name: str) -> list[str]:
    """Every name of a parameter: several where the model ties it."""
    canonical = canonical_name(card, name)
    return [canonical, *(alias for alias, target in card.tied.items() if target == canonical)]


def module_path(name: str) -> str:
    """The module that has a parameter."""
    return name.rpartition(".")[0]


def in_decoder(card: ModelCard, name: str) -> bool:
    """Whether a module or parameter may run in `decode`.

    Only of the vision tower, the projector and the token embedding is it known that they do not.
    """
    return not _is_inside(name, card.vision_tower, card.projector, card.token_embedding)


def before_decoder(card: ModelCard, name: str) -> bool:
    """Whether a module or parameter may run in `embed`, that is before the decoder's layers.

    Only of layers, final norm and head is it known that they do not. What can not be told (a
    position embedding, a projection behind the layers) counts as both below and above.
    """
    return card.layer_of(name) is None and not _is_inside(name, card.norm, card.head)


def _is_inside(name: str, *roots: str) -> bool:
    return any(root and (name == root or name.startswith(f"{root}.")) for root in roots)
