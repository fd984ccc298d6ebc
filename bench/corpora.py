"""Training cases for editors that show some: what their settings name, as values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.functional.errors import BadInput
from errata.functional.types import Case

__all__ = ["WORLD", "corpus"]

WORLD = 64  # cases of the micro world, where the settings do not say how many


def corpus(config: Any) -> list[Case] | None:
    """The cases that `config.demonstrations` names, at most `config.cases`; None for no name.

    "world": cases of the micro world's training split. Anything else is an annotation file of the
    field's benchmarks, whose pictures are looked for only where they are shown. Raises BadInput for
    a file that is not there or holds no case.

    >>> from errata.editors import IkeConfig
    >>> len(corpus(IkeConfig(demonstrations="world", cases=3)))
    3
    """
    named, most = getattr(config, "demonstrations", ""), getattr(config, "cases", 0)
    if not named:
        return None
    from .data import Options, open_cases
    from .data.world import cases

    if named == "world":
        return cases(most or WORLD, split="train")
    path = Path(named)
    if not path.is_file():
        raise BadInput(
            f"demonstrations must be 'world' or an annotation file; there is none at {path}."
        )
    shown = bool(getattr(config, "pictured", False))
    options = Options(on_missing="error" if shown else "none", limit=most)
    found = list(open_cases(path, options))
    if not found:
        raise BadInput(f"{path} must hold cases for demonstrations; it has none.")
    return found
