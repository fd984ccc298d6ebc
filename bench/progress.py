"""Progress on stderr: how far, how fast, how much longer. Quiet where nobody looks."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Progress", "duration"]


def duration(seconds: float) -> str:
    """A stretch of time as people say it.

    >>> duration(4.2), duration(75), duration(7300)
    ('4 s', '1 min 15 s', '2 h 2 min')
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
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._every = 0.1 if self._live else every
        self._shown = 0.0
        self._width = 0
        self._said = -1  # steps done when the last line was shown
        self._label, self._total, self._done, self._fresh = "", 0, 0, 0
        self._began = time.monotonic()

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Begin a stretch of `total` steps, of which `done` were finished in an earlier run."""
        self._label, self._total, self._done, self._fresh = label, total, done, 0
        self._began = self._shown = time.monotonic()
        self._said = -1
        if self._live:
            self._show()

    def step(self, count: int = 1) -> None:
        """Count finished steps."""
        self._done += count
        self._fresh += count
        if time.monotonic() - self._shown >= self._every:
            self._show()

    def stop(self) -> None:
        """End the stretch: its last line stays."""
        if self._live or self._said != self._done:
            self._show()
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0

    def note(self, text: str) -> None:
        """A line of its own."""
        self._stream.write(("\r" + " " * self._width + "\r" if self._live else "") + text + "\n")
        self._stream.flush()

    def _show(self) -> None:
        self._shown = now = time.monotonic()
        self._said = self._done
        spent = now - self._began
        words = f"{self._label}  {self._done}/{self._total} edits"
        if self._fresh and spent > 0:
            rate = self._fresh / spent
            speed = f"{rate:.1f} edits/s" if rate >= 1 else f"{1 / rate:.1f} s/edit"
            left = (self._total - self._done) / rate
            words += f"  {speed}  " + (
                f"{duration(left)} left" if left else f"in {duration(spent)}"
            )
        if self._live:
            self._stream.write("\r" + words + " " * max(0, self._width - len(words)))
            self._width = len(words)
        else:
            self._stream.write(words + "\n")
        self._stream.flush()
