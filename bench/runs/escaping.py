"""Text of files, models and users on a terminal: control characters become visible escapes.

Everything that a command prints goes through here, errors and JSON included, so no name in a file
can move the cursor, change colours or hide what stands before it.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

__all__ = ["EscapedStream", "escape"]

_UNSAFE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f"  # C0 but tab and newline, DEL, C1
    "\\u00ad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e"  # invisible, bidirectional
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\ud800-\\udfff\\U000e0000-\\U000e007f]"  # halves of surrogate pairs, tags
)


def escape(text: str) -> str:
    r"""Replace control, bidirectional and invisible characters by `\uXXXX`.

    Args:
        text: Any text.

    Returns:
        The text as it may be printed. In a JSON string the escapes mean the same characters.

    Example:
        >>> escape("a\x1b[31mb\u202e")
        'a\\u001b[31mb\\u202e'
    """
    return _UNSAFE.sub(lambda found: _escaped(found[0]), text)


def _escaped(char: str) -> str:
    if ord(char) < 0x10000:
        return f"\\u{ord(char):04x}"
    high, low = divmod(ord(char) - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


class EscapedStream:
    """A text stream that escapes what is written to it.

    Args:
        stream: Where the text goes.

    Attributes:
        raw_stream: The stream itself, for output whose control characters are ours.
    """

    def __init__(self, stream: TextIO) -> None:
        self.raw_stream = stream

    def write(self, text: str) -> int:
        """Write text, escaped.

        Args:
            text: The text.

        Returns:
            The number of characters of `text`.
        """
        self.raw_stream.write(escape(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw_stream, name)
