"""Where a run's time goes: stretches by name, each second counted once, for the innermost name.

    with running() as clock:
        with part("edit steps"):
            ...
    clock.seconds                     # {("", "edit steps"): 1.2, ...}

Nothing is measured unless a clock runs, and then the process' other threads are not looked at. What
the model does on the way (reading, looking at pictures, the head) is found by wrapping the adapters
for as long as the clock runs. Stretches also carry their names into any torch profiler.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Clock", "about", "ops", "part", "running"]

_running: Clock | None = None
_ITSELF = "the profiler"  # not of the run: left out of the shares


class Clock:
    """Seconds by (what it is about, name of the stretch), and the busiest operators."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.ops: dict[str, list[tuple[str, float, int]]] = {}  # by subject: name, seconds, calls
        self.subject = ""
        self.thread = threading.get_ident()
        self._names: list[str] = ["other"]
        self._last = self._now()

    def enter(self, name: str) -> None:
        self._lap()
        self._names.append(name)

    def leave(self) -> None:
        self._lap()
        self._names.pop()

    def turn(self, subject: str) -> None:
        """What follows is about something else."""
        self._lap()
        self.subject = subject

    def shares(self) -> dict[str, dict[str, tuple[float, float]]]:
        """By subject, each stretch's seconds and its share of the subject's, the longest first."""
        whole: dict[str, float] = defaultdict(float)
        own = {key: spent for key, spent in self.seconds.items() if key[1] != _ITSELF}
        for (subject, _), spent in own.items():
            whole[subject] += spent
        found: dict[str, dict[str, tuple[float, float]]] = {subject: {} for subject in whole}
        for (subject, name), spent in sorted(own.items(), key=lambda one: -one[1]):
            found[subject][name] = (spent, spent / max(whole[subject], 1e-9))
        return found

    def _lap(self) -> None:
        now = self._now()
        self.seconds[self.subject, self._names[-1]] += now - self._last
        self._last = now

    def _now(self) -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """What runs inside is `name`, but for parts of its own."""
    clock = _running
    if clock is None or clock.thread != threading.get_ident():
        yield
        return
    clock.enter(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        clock.leave()


def about(subject: str) -> None:
    """What follows is about `subject`, as far as the running clock is concerned."""
    if _running is not None:
        _running.turn(subject)


@contextlib.contextmanager
def ops() -> Iterator[None]:
    """Look at operators inside with torch's profiler, once per subject of the running clock."""
    clock = _running
    if clock is None or clock.subject in clock.ops:
        yield
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    seen = torch.profiler.profile(activities=kinds)
    clock.enter(_ITSELF)
    seen.start()
    clock.leave()
    try:
        yield
    finally:
        clock.enter(_ITSELF)
        seen.stop()
        clock.ops[clock.subject] = _busiest(seen, {name for _, name in clock.seconds})
        clock.leave()


def _busiest(seen: torch.profiler.profile, parts: set[str]) -> list[tuple[str, float, int]]:
    """The operators that took longest, parts of ours left out."""
    field = "self_device_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
    rows = [(one.key, getattr(one, field) / 1e6, one.count) for one in seen.key_averages()]
    return sorted((row for row in rows if row[0] not in parts), key=lambda row: -row[1])[:12]


@contextlib.contextmanager
def running() -> Iterator[Clock]:
    """A clock runs inside; one at a time."""
    global _running
    from errata.adapters.anatomy import Anatomy
    from errata.adapters.core import Decoder
    from errata.adapters.read import Reader
    from errata.adapters.whole import Whole

    places: list[tuple[Any, str, str]] = [
        (Reader, "__call__", "reading"),
        (Whole, "__call__", "reading"),
        (Decoder, "embed", "pictures and embedding"),
        (Anatomy, "finish", "head"),
    ]
    own = [(home, name, vars(home)[name]) for home, name, _ in places if name in vars(home)]
    labels = {(home, name): label for home, name, label in places}
    try:
        for home, name, call in own:
            setattr(home, name, _timed(call, labels[home, name]))
        _running = Clock()
        yield _running
    finally:
        if _running is not None:
            _running.turn("")
        _running = None
        for home, name, call in own:
            setattr(home, name, call)


def _timed(call: Callable[..., Any], label: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with part(label):
            return call(*args, **kwargs)

    return timed
