"""Where a parameter is used: its names, and whether it runs before the decoder or in it."""

from __future__ import annotations

from .card import ModelCard

__all__ = ["canonical", "module_of", "runs_above", "runs_below", "uses"]


def canonical(card: ModelCard, name: str) -> str:
    """The name under which a model's `params` hold a parameter: its own, unless it is tied."""
    return card.ties.get(name, name)


def uses(card: ModelCard, name: str) -> list[str]:
    """Every name of a parameter: several where the model ties it."""
    home = canonical(card, name)
    return [home, *(alias for alias, target in card.ties.items() if target == home)]


def module_of(name: str) -> str:
    """The module that has a parameter."""
    return name.rpartition(".")[0]


def runs_above(card: ModelCard, name: str) -> bool:
    """Whether a module or parameter may run in `decode`.

    Only of the vision tower, the projector and the token embedding is it known that they do not.
    """
    return not _inside(name, card.vision, card.projector, card.tokens)


def runs_below(card: ModelCard, name: str) -> bool:
    """Whether a module or parameter may run in `embed`, that is before the decoder's layers.

    Only of layers, final norm and head is it known that they do not. What can not be told (a
    position embedding, a projection behind the layers) counts as both below and above.
    """
    return card.layer_of(name) is None and not _inside(name, card.norm, card.head)


def _inside(name: str, *roots: str) -> bool:
    return any(root and (name == root or name.startswith(f"{root}.")) for root in roots)
