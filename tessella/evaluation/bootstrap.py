"""Intervals by resampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap interval; None where no resamples were asked for."""

    value: float
    interval: tuple[float, float] | None


def resamples(count: int, num_resamples: int, rng: torch.Generator) -> Iterator[Tensor]:
    """How often each of ``count`` samples is drawn, in ``count`` draws with replacement."""
    for _ in range(num_resamples):
        yield torch.randint(count, (count,), generator=rng).bincount(minlength=count)


def estimate(value: float, resampled: Tensor, confidence: float, least: float, most: float = float("inf")) -> Estimate:
    """The quantiles of the resampled values about their mean, put about the value.

    A resample holds some samples twice and others not at all, which by itself enlarges distances and scores; that
    bias, far wider than the spread, says nothing of how the value varies between sample sets.
    """
    if not len(resampled):
        return Estimate(value, None)
    tail = (1 - confidence) / 2
    spread = (resampled - resampled.mean()).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    low, high = (value + spread).clamp(least, most).tolist()
    return Estimate(value, (low, high))
