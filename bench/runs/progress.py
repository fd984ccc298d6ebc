"""Progress on stderr: how far, how fast, how much longer. Quiet where nobody looks."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from errata.bench.runs.escaping import escape

__all__ = ["Progress", "duration"]


def duration(seconds: float) -> str:
    """A duration as people say it.

    >>> duration(4.2), duration(75), duration(7300)
    ('4 s', '1 min 15 s', '2 h 1 min')

    Args:
        seconds: Seconds.

    Returns:
        Text.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """One line that is rewritten on a terminal; a line every `every` seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        # the carriage returns are ours, so the words are escaped here
        self._stream = stream or getattr(sys.stderr, "raw_stream", sys.stderr)
        self._is_terminal = self._stream.isatty()
        self._every = 0.1 if self._is_terminal else every
        self._last_shown_time = 0.0
        self._width = 0
        self._last_shown_count = -1  # steps done when the last line was shown
        self._label, self._total, self._num_done, self._num_new = "", 0, 0, 0
        self._start_time = time.monotonic()

    def start(self, label: str, total: int, num_completed: int = 0) -> None:
        """Begin a leg.

        Args:
            label: Its name.
            total: Its steps.
            num_completed: Steps completed in an earlier run.
        """
        self._label, self._total, self._num_done, self._num_new = label, total, num_completed, 0
        self._start_time = self._last_shown_time = time.monotonic()
        self._last_shown_count = -1
        if self._is_terminal:
            self._show()

    def step(self, count: int = 1) -> None:
        """Count finished steps."""
        self._num_done += count
        self._num_new += count
        if time.monotonic() - self._last_shown_time >= self._every:
            self._show()

    def stop(self) -> None:
        """End the stretch: its last line stays."""
        if self._is_terminal or self._last_shown_count != self._num_done:
            self._show()
        if self._is_terminal:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0

    def note(self, text: str) -> None:
        """A line of its own."""
        self._stream.write(
            ("\r" + " " * self._width + "\r" if self._is_terminal else "") + escape(text) + "\n"
        )
        self._stream.flush()

    def _show(self) -> None:
        self._last_shown_time = now = time.monotonic()
        self._last_shown_count = self._num_done
        spent = now - self._start_time
        words = f"{escape(self._label)}  {self._num_done}/{self._total} edits"
        if self._num_new and spent > 0:
            rate = self._num_new / spent
            speed = f"{rate:.1f} edits/s" if rate >= 1 else f"{1 / rate:.1f} s/edit"
            left = (self._total - self._num_done) / rate
            words += f"  {speed}  " + (
                f"{duration(left)} left" if left else f"in {duration(spent)}"
            )
        if self._is_terminal:
            self._stream.write("\r" + words + " " * max(0, self._width - len(words)))
            self._width = len(words)
        else:
            self._stream.write(words + "\n")
        self._stream.flush()
