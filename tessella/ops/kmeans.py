"""k-means with k-means++ seeding (Arthur and Vassilvitskii, 2007)."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.ops.nearest import nearest


def kmeans(x: Tensor, num_clusters: int, *, num_iterations: int, rng: torch.Generator, num_restarts: int = 1) -> Tensor:
    """Centres ``[num_clusters, D]`` of ``x [N, D]``: the best of some runs of Lloyd's iteration.

    A centre that loses all points moves onto the point farthest from its own centre, so that clusters stay empty only
    where there are fewer distinct points than clusters. Time O(N D num_clusters num_iterations num_restarts) at most,
    for a run ends when no point changes its cluster; memory O(N D).

    Args:
        x: the points.
        num_clusters: at least 1.
        num_iterations: at most so many in each run.
        rng: on the CPU; each run draws ``num_clusters`` numbers.
        num_restarts: runs, of which the one with the least sum of squared distances is returned, the first of equals.

    Raises:
        ValueError: fewer points than clusters.
    """
    if not 1 <= num_clusters <= len(x):
        raise ValueError(f"num_clusters must lie in [1, {len(x)}] (the number of points), got {num_clusters}")
    runs = [_lloyd(x, x[_seeds(x, num_clusters, rng)], num_iterations) for _ in range(num_restarts)]
    return runs[0] if num_restarts == 1 else min(runs, key=lambda centres: _distortion(x, centres))


def _lloyd(x: Tensor, centres: Tensor, num_iterations: int) -> Tensor:
    before = None
    for _ in range(num_iterations):
        assigned = nearest(x, centres)
        if before is not None and torch.equal(assigned, before):
            break
        counts = torch.bincount(assigned, minlength=len(centres))[:, None]
        means = torch.zeros_like(centres).index_add_(0, assigned, x) / counts.clamp(min=1)
        empty = (counts[:, 0] == 0).nonzero()[:, 0]
        if len(empty):
            distance = (x - centres[assigned]).square().sum(-1)
            means[empty] = x[distance.topk(len(empty)).indices]
        centres, before = means, assigned
    return centres


def _distortion(x: Tensor, centres: Tensor) -> float:
    return float((x - centres[nearest(x, centres)]).square().sum(dtype=torch.float64))


def _seeds(x: Tensor, num_clusters: int, rng: torch.Generator) -> Tensor:
    """Rows of ``x``, each drawn with probability proportional to its squared distance to those drawn before."""
    uniform = torch.rand(num_clusters, generator=rng, dtype=torch.float64).to(x.device)
    chosen = torch.empty(num_clusters, dtype=torch.long, device=x.device)
    distance = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    for k in range(num_clusters):
        cumulative = distance.cumsum(0)
        # Fewer distinct rows than clusters leave no distance at all: then any row will do.
        threshold = uniform[k] * cumulative[-1]
        chosen[k] = torch.searchsorted(cumulative, threshold, right=True).clamp(max=x.shape[0] - 1)
        to_new = (x - x[chosen[k]]).square().sum(-1).double()
        distance = to_new if k == 0 else torch.minimum(distance, to_new)
    return chosen
