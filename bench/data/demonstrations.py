"""Training cases for editors that show some: what their settings name, as values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.functional.errors import InvalidInputError
from errata.functional.queries import Case

__all__ = ["DEFAULT_WORLD_CASES", "demonstration_cases"]

DEFAULT_WORLD_CASES = 64  # cases of the micro world, where the settings do not say how many


def demonstration_cases(config: Any) -> list[Case] | None:
    """The cases that `config.demonstration_source` names, at most `config.num_source_cases`; None
    for no name.

    "world": cases of the micro world's training split. Anything else is an annotation file of the
    field's benchmarks, whose pictures are looked for only where they are shown. Raises
    InvalidInputError for a file that is not there or holds no case.

    >>> from errata.editors import IkeConfig
    >>> len(demonstration_cases(IkeConfig(demonstration_source="world", num_source_cases=3)))
    3
    """
    source, max_cases = (
        getattr(config, "demonstration_source", ""),
        getattr(config, "num_source_cases", 0),
    )
    if not source:
        return None
    from errata.bench.data.benchmarks.table import open_cases
    from errata.bench.data.reading.benchmark import ReadOptions
    from errata.bench.data.world.cases import cases

    if source == "world":
        return cases(max_cases or DEFAULT_WORLD_CASES, split="train")
    path = Path(source)
    if not path.is_file():
        raise InvalidInputError(
            f"demonstration_source must be 'world' or an annotation file; there is none at {path}."
        )
    include_images = bool(getattr(config, "include_images", False))
    options = ReadOptions(missing_images="error" if include_images else "none", limit=max_cases)
    loaded_cases = list(open_cases(path, options))
    if not loaded_cases:
        raise InvalidInputError(f"{path} must hold cases for demonstrations; it has none.")
    return loaded_cases
