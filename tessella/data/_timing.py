"""Where the time of reading goes, for those who ask."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)


@contextmanager
def measured(seconds: dict[str, float]) -> Iterator[None]:
    """Let what is :func:`timed` add its seconds to ``seconds`` while the block runs, in this thread."""
    token = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(token)


def timed(part: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose seconds count as ``part`` where somebody measures."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            seconds = _seconds.get()
            if seconds is None:
                return function(*args, **kwargs)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started

        return call

    return decorate
