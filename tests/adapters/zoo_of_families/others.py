"""Tiny random models of families that have no line in the table, for the generic path.

Each entry makes a module and rows with images, by the model's own input names (None: text only).
`write_families.py` runs them all and writes adapters/families/FAMILIES.md.
"""

from tests.adapters.zoo_of_families import features as others_features
from tests.adapters.zoo_of_families import recent as others_recent
from tests.adapters.zoo_of_families import text as others_text
from tests.adapters.zoo_of_families.parts import CLIP, OTHERS, TEXT

__all__ = ["CLIP", "OTHERS", "TEXT", "others_features", "others_recent", "others_text"]
