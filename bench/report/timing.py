"""Profile of a run as a table."""

from __future__ import annotations

from pathlib import Path

import msgspec

__all__ = ["read_profile", "timing_table"]


def read_profile(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Where a profiled run's time went, by leg: each stretch's seconds and share, longest first."""
    path = folder / "profile.json"
    if not path.is_file():
        return {}
    found = msgspec.json.decode(path.read_bytes())
    return {
        leg: {name: (one["seconds"], one["share"]) for name, one in about["parts"].items()}
        for leg, about in found.items()
    }


def timing_table(folder: Path) -> str:
    """The same as a table of text: a line per stretch, under its leg."""
    lines = []
    for leg, parts in read_profile(folder).items():
        lines.append(f"{leg}: {sum(spent for spent, _ in parts.values()):.1f} s")
        lines += [
            f"  {share:6.1%}  {spent:8.2f} s  {name}" for name, (spent, share) in parts.items()
        ]
    return "\n".join(lines)
