"""Guidance scales that change while sampling: functions of its progress in [0, 1)."""

from __future__ import annotations

import math
from collections.abc import Callable

from tessella.generators.base import Guidance
from tessella.generators.sampling import check_guidance


def interval(scale: float, start: float, stop: float) -> Callable[[float], float]:
    """``scale`` while start <= progress < stop, none outside (Kynkäänniemi et al., arXiv 2404.07724).

    Raises:
        ValueError: a negative scale, or bounds out of order or of [0, 1].
    """
    check_guidance(scale)
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"the interval must satisfy 0 <= start <= stop <= 1, got {start} .. {stop}")
    return lambda progress: scale if start <= progress < stop else 1.0


def linear(first: float, last: float) -> Callable[[float], float]:
    """From ``first`` at progress 0 evenly to ``last`` at progress 1.

    Raises:
        ValueError: a negative scale.
    """
    check_guidance(first)
    check_guidance(last)
    return lambda progress: first + (last - first) * progress


def cosine(first: float, last: float) -> Callable[[float], float]:
    """From ``first`` at progress 0 to ``last`` at progress 1 along half a cosine, level at both ends.

    Raises:
        ValueError: a negative scale.
    """
    check_guidance(first)
    check_guidance(last)
    return lambda progress: first + (last - first) * (1 - math.cos(math.pi * progress)) / 2


_SCHEDULES: dict[str, tuple[Callable[..., Callable[[float], float]], int]] = {
    "interval": (interval, 3),
    "linear": (linear, 2),
    "cosine": (cosine, 2),
}


def parse_guidance(text: str) -> Guidance:
    """A scale or a schedule as one writes it: ``2.0``, ``interval:2.0,0.2,0.8``, ``linear:1,3`` or ``cosine:1,3``.

    Raises:
        ValueError: anything else; the message says what is accepted.
    """
    name, colon, rest = text.partition(":")
    try:
        numbers = [float(number) for number in (rest if colon else text).split(",")]
    except ValueError:
        numbers = []
    if not colon and len(numbers) == 1:
        check_guidance(numbers[0])
        return numbers[0]
    schedule, count = _SCHEDULES.get(name, (interval, -1))
    if len(numbers) != count:
        raise ValueError(
            "guidance must be a number, interval:SCALE,START,STOP, linear:FIRST,LAST or cosine:FIRST,LAST, "
            f"got {text!r}"
        )
    return schedule(*numbers)
