"""Named spans of the forward, which an observer such as a profiler can measure.

A span costs one context variable lookup if nothing observes it. Only the thread and context that
called `observing` are observed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

__all__ = ["Observer", "observing", "spanned"]

Observer = Callable[[str], AbstractContextManager[None]]
"""Name of a span -> a context in which it runs."""

_OBSERVER: ContextVar[Observer | None] = ContextVar("errata_span_observer", default=None)

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Run every span inside the block in the context that `observer` returns for its name.

    Args:
        observer: Called with the name of each span.

    Yields:
        Nothing.

    Example:
        >>> names = []
        >>> @contextmanager
        ... def observer(name):
        ...     names.append(name)
        ...     yield
        >>> @spanned("head")
        ... def run():
        ...     return 1
        >>> with observing(observer):
        ...     run()
        1
        >>> names
        ['head']
    """
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def spanned(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function as a span.

    Args:
        name: The name that observers see.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            observer = _OBSERVER.get()
            if observer is None:
                return function(*args, **kwargs)
            with observer(name):
                return function(*args, **kwargs)

        return run

    return decorate
