"""Profile of a run as a table."""

from __future__ import annotations

from pathlib import Path

import msgspec

__all__ = ["read_profile", "timing_table"]


def read_profile(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Read the time of a profiled run.

    Args:
        folder: The run folder.

    Returns:
        Seconds and share of each section, longest first, by leg.
    """
    path = folder / "profile.json"
    if not path.is_file():
        return {}
    found = msgspec.json.decode(path.read_bytes())
    return {
        leg: {name: (one["seconds"], one["share"]) for name, one in about["parts"].items()}
        for leg, about in found.items()
    }


def timing_table(folder: Path) -> str:
    """The time of a profiled run as text.

    Args:
        folder: The run folder.

    Returns:
        A line per section, grouped by leg.
    """
    lines = []
    for leg, parts in read_profile(folder).items():
        lines.append(f"{leg}: {sum(spent for spent, _ in parts.values()):.1f} s")
        lines += [
            f"  {share:6.1%}  {spent:8.2f} s  {name}" for name, (spent, share) in parts.items()
        ]
    return "\n".join(lines)
