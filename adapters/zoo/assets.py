"""Paths and sizes of the shipped files. No torch."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER", "TOKENIZER", "WEIGHTS"]

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights"
TOKENIZER = FOLDER / "tokenizer.json"


IMAGE_SIZE = 64
