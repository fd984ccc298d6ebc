"""Where a run's time goes: sections by name, each second counted once, for the innermost name.

    with active_profiler() as profiler:
        with section("edit steps"):
            ...
    profiler.seconds                  # {("", "edit steps"): 1.2, ...}

Nothing is measured unless a profiler is active, and then only its own thread. What the model does
(preprocessing, images and embedding, the head) are spans of the adapters, see
`functional/forward/spans.py`. Sections carry their names into any torch profiler.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from errata.functional.forward.spans import observing

__all__ = ["Profiler", "active_profiler", "record_operators", "section", "subject"]

_active_profiler: Profiler | None = None
_PROFILER_OVERHEAD = "the profiler"  # not of the run: left out of the shares


class Profiler:
    """Seconds by (what it is about, name of the stretch), and the busiest operators."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.operators: dict[
            str, list[tuple[str, float, int]]
        ] = {}  # by subject: name, seconds, calls
        self.subject = ""
        self.thread_id = threading.get_ident()
        self._section_stack: list[str] = ["other"]
        self._last_time = self._now()

    def enter(self, name: str) -> None:
        """Start a section inside the current one.

        Args:
            name: Name of the section.
        """
        self._lap()
        self._section_stack.append(name)

    def leave(self) -> None:
        self._lap()
        self._section_stack.pop()

    def set_subject(self, subject: str) -> None:
        """What follows is about something else."""
        self._lap()
        self.subject = subject

    def shares(self) -> dict[str, dict[str, tuple[float, float]]]:
        """By subject, each stretch's seconds and its share of the subject's, the longest first."""
        whole: dict[str, float] = defaultdict(float)
        own = {key: spent for key, spent in self.seconds.items() if key[1] != _PROFILER_OVERHEAD}
        for (subject, _), spent in own.items():
            whole[subject] += spent
        found: dict[str, dict[str, tuple[float, float]]] = {subject: {} for subject in whole}
        for (subject, name), spent in sorted(own.items(), key=lambda one: -one[1]):
            found[subject][name] = (spent, spent / max(whole[subject], 1e-9))
        return found

    def _lap(self) -> None:
        now = self._now()
        self.seconds[self.subject, self._section_stack[-1]] += now - self._last_time
        self._last_time = now

    def _now(self) -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Attribute the time of a `with` block to a section, except for sections inside it.

    Args:
        name: Name of the section.

    Yields:
        Nothing.
    """
    profiler = _active_profiler
    if profiler is None or profiler.thread_id != threading.get_ident():
        yield
        return
    profiler.enter(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        profiler.leave()


def subject(subject: str) -> None:
    """What follows is about `subject`, as far as the running clock is concerned."""
    if _active_profiler is not None:
        _active_profiler.set_subject(subject)


@contextlib.contextmanager
def record_operators() -> Iterator[None]:
    """Look at operators inside with torch's profiler, once per subject of the running clock."""
    profiler = _active_profiler
    if profiler is None or profiler.subject in profiler.operators:
        yield
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=kinds)
    profiler.enter(_PROFILER_OVERHEAD)
    profile.start()
    profiler.leave()
    try:
        yield
    finally:
        profiler.enter(_PROFILER_OVERHEAD)
        profile.stop()
        profiler.operators[profiler.subject] = _busiest_operators(
            profile, {name for _, name in profiler.seconds}
        )
        profiler.leave()


def _busiest_operators(
    profile: torch.profiler.profile, section_names: set[str]
) -> list[tuple[str, float, int]]:
    """The operators that took longest, parts of ours left out."""
    field = "self_device_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
    rows = [(one.key, getattr(one, field) / 1e6, one.count) for one in profile.key_averages()]
    return sorted((row for row in rows if row[0] not in section_names), key=lambda row: -row[1])[
        :12
    ]


@contextlib.contextmanager
def active_profiler() -> Iterator[Profiler]:
    """Run a profiler inside the block, one at a time. It also measures the spans of the forward."""
    global _active_profiler
    _active_profiler = profiler = Profiler()
    try:
        with observing(section):
            yield profiler
    finally:
        profiler.set_subject("")
        _active_profiler = None
