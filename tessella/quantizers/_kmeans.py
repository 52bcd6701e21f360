"""k-means with k-means++ seeding (Arthur and Vassilvitskii, 2007), for the first codes of a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.ops import nearest


def kmeans(x: Tensor, num_clusters: int, *, num_iterations: int, rng: torch.Generator) -> Tensor:
    """Centres ``[num_clusters, D]`` of ``x [N, D]`` after Lloyd iterations; a centre that loses all points stays.

    Time O(N D num_clusters (1 + num_iterations)), memory O(N D). ``rng`` lives on the CPU.
    """
    centres = x[_seeds(x, num_clusters, rng)]
    for _ in range(num_iterations):
        assigned = nearest(x, centres)
        counts = torch.bincount(assigned, minlength=num_clusters)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, assigned, x)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


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
