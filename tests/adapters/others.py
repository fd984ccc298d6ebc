"""Tiny random models of families that have no line in the table, for the generic path.

Each entry makes a module and rows with pictures, by the model's own input names (None: text only).
`write_families.py` beside this runs them all and writes adapters/FAMILIES.md.
"""

from tests.adapters import others_features, others_recent, others_text
from tests.adapters.others_parts import CLIP, OTHERS, TEXT

__all__ = ["CLIP", "OTHERS", "TEXT", "others_features", "others_recent", "others_text"]
