"""Repair of broken encodings and paraphrase debris."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from errata.functional.errors import InvalidInputError

__all__ = ["clean_rephrase", "fix_mojibake", "require_valid_unicode"]


def require_valid_unicode(raw: Mapping[str, Any]) -> None:
    """Refuse lone surrogates. JSON can encode them but tokenizers cannot read them.

    Args:
        raw: A record.

    Raises:
        InvalidInputError: If a field has a lone surrogate.
    """
    try:
        msgspec.json.encode(raw)
    except UnicodeEncodeError as fault:
        raise InvalidInputError("text must be Unicode; a field has a lone surrogate.") from fault


_REFUSAL_PATTERN = re.compile(r"i'm sorry|i cannot|i can't|as an ai|language model", re.IGNORECASE)
_LEAD_IN_PATTERN = re.compile(
    r"^\W*(?:rewritten|rephrased|paraphrased)[\w\s]*:\s*|^.*?\bre(?:written|phrased) as:?\s*",
    re.IGNORECASE | re.DOTALL,
)
_QUOTES = "\"“”'`"


def clean_rephrase(text: str) -> str:
    """Remove the debris of the paraphrasing model from a paraphrase.

    Quotes are stripped from each end independently, since they are unbalanced in MMEdit. A lead-in
    ("Rewritten question:", "... can be rewritten as") is removed. Only the first line is kept.

    Args:
        text: The paraphrase.

    Returns:
        The clean text. Empty if the paraphrase is a refusal.

    Example:
        >>> clean_rephrase('Rewritten question: "How many balls are there?')
        'How many balls are there?'
        >>> clean_rephrase('"Why?"')
        'Why?'
        >>> clean_rephrase("I'm sorry, but I cannot see the image.")
        ''
    """
    if _REFUSAL_PATTERN.search(text):
        return ""
    rest = _LEAD_IN_PATTERN.sub("", text.strip())
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    return lines[0].strip(_QUOTES).strip() if lines else ""


def fix_mojibake(text: str) -> str:
    """Repair UTF-8 that was read as Windows-1252.

    Args:
        text: Any text.

    Returns:
        The repaired text. Unchanged if it cannot be such an error.

    Example:
        >>> fix_mojibake("itâ€™s dusk"), fix_mojibake("café")
        ('it’s dusk', 'café')
    """
    if text.isascii():
        return text
    try:
        return text.encode("cp1252").decode()
    except UnicodeError:
        return text
