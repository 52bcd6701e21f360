"""Guidance scales that change while sampling: functions of its progress in [0, 1)."""

from __future__ import annotations

import math
from collections.abc import Callable

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
