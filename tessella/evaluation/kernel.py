"""Kernel distance between sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al., JMLR 13 (2012), lemma 6) of two sets of equal size.

    With the polynomial kernel ``(x.y / D + 1)^3`` of the kernel Inception distance (Binkowski et al., arXiv
    1801.01401). Its expectation does not depend on the sizes of the sets, and it may be below 0.

    Args:
        samples: ``[N, D]``.
        reference: ``[N, D]``.

    Raises:
        ValueError: shapes that differ, or fewer than two points.
    """
    if samples.ndim != 2 or samples.shape != reference.shape or len(samples) < 2:
        raise ValueError(
            f"both sets must be [N, D] of at least two points, got {list(samples.shape)} and {list(reference.shape)}"
        )
    x, y = samples.double(), reference.double()
    count = len(x)
    own = sum((_kernel(points, points).sum() - _kernel_with_itself(points).sum()).item() for points in (x, y))
    return own / (count * (count - 1)) - 2 * _kernel(x, y).mean().item()


def subset_distances(
    samples: Tensor, reference: Tensor, num_subsets: int, subset_size: int, rng: torch.Generator
) -> Tensor:
    """:func:`kernel_distance` of ``num_subsets`` pairs of subsets, each drawn without replacement; float64.

    Args:
        samples: ``[N, D]``.
        reference: ``[M, D]``.
        num_subsets: at least 1.
        subset_size: points of each; as many as the smaller set has where that is fewer.
        rng: what the subsets are drawn with.
    """
    size = min(subset_size, len(samples), len(reference))
    distances = []
    for _ in range(num_subsets):
        own, other = (points[torch.randperm(len(points), generator=rng)[:size]] for points in (samples, reference))
        distances.append(kernel_distance(own, other))
    return torch.tensor(distances, dtype=torch.float64)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_with_itself(x: Tensor) -> Tensor:
    return (x.square().mean(1) + 1) ** 3
