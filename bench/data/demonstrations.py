"""Training cases for editors that take demonstrations, from the names in their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.functional.errors import InvalidInputError
from errata.functional.queries import Case

__all__ = ["DEFAULT_WORLD_CASES", "demonstration_cases"]

DEFAULT_WORLD_CASES = 64  # cases of the micro world if the settings give no number


def demonstration_cases(config: Any) -> list[Case] | None:
    """Load the demonstration cases that an editor's settings name.

    "world" stands for the training split of the micro world. Anything else is the path of a
    benchmark's annotation file. Its images must exist only if `config.include_images` is true.

    Args:
        config: Settings of an editor. Reads `demonstration_source`, `num_source_cases` (0: 64
            cases of the world, or all cases of a file) and `include_images`, if present.

    Returns:
        At most `num_source_cases` cases. None if `demonstration_source` is absent or empty.

    Raises:
        InvalidInputError: If the file does not exist, cannot be read or holds no case.

    Example:
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
