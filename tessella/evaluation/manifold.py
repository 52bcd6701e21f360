"""Precision, recall, density, coverage and nearest neighbours among features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 2048  # rows and columns of the distances that exist at a time: 32 MiB of float64


class Neighbours(NamedTuple):
    """For each of N queries its k nearest points, nearest first: ``distances [N, k]``, ``indices [N, k]``."""

    distances: Tensor
    indices: Tensor


def nearest_neighbours(queries: Tensor, points: Tensor, k: int = 1) -> Neighbours:
    """The k nearest ``points [M, D]`` of each of ``queries [N, D]`` in Euclidean distance, exactly.

    With samples as queries and the training set as points: a sample at a distance far below what real held-out
    pictures have to the training set is copied from it. Memory is that of one tile, not N x M.

    Raises:
        ValueError: shapes that do not fit, or fewer points than k.
    """
    _, indices = _nearest(queries, points, k)
    # Again from the differences: |q|^2 - 2 q.p + |p|^2 loses the digits of small distances.
    differences = (queries.double() - points[column].double() for column in indices.T)
    distances = torch.stack([torch.linalg.vector_norm(difference, dim=1) for difference in differences], 1)
    return Neighbours(distances, indices)


class Coverage(NamedTuple):
    """Which samples ``[N]`` lie in the reference's manifold, and which reference pictures ``[M]`` in the samples'."""

    precise: Tensor
    recalled: Tensor

    @property
    def precision(self) -> float:
        """The share of samples that look like the reference."""
        return self.precise.double().mean().item()

    @property
    def recall(self) -> float:
        """The share of the reference that the samples cover."""
        return self.recalled.double().mean().item()


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> Coverage:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    The manifold of a set is the union of the balls around its points that reach to their k-th nearest neighbour within
    the set. Both numbers depend on the sizes of both sets; memory is that of one tile, not N x M.

    Args:
        samples: ``[N, D]``.
        reference: ``[M, D]``.
        k: which neighbour gives the radius.

    Raises:
        ValueError: shapes that do not fit, or a set of no more than k points.
    """
    for name, points in (("samples", samples), ("reference", reference)):
        if len(points) <= k:
            raise ValueError(f"{name} must hold more than k = {k} points, got {len(points)}")
    return Coverage(
        precise=_in_manifold(samples, reference, _radii(reference, k)),
        recalled=_in_manifold(reference, samples, _radii(samples, k)),
    )


class DensityCoverage(NamedTuple):
    """How densely the reference lies about each sample ``[N]`` (float64), and which of it ``[M]`` has a sample near."""

    densities: Tensor
    covered: Tensor

    @property
    def density(self) -> float:
        """1 for samples like the reference in expectation; above where they gather in its dense parts."""
        return self.densities.mean().item()

    @property
    def coverage(self) -> float:
        """The share of the reference that has a sample in its ball."""
        return self.covered.double().mean().item()


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al., arXiv 2002.09797, equations 3 and 4).

    Both count samples in the balls around the reference's points, which reach to their k-th nearest neighbour within
    the reference: one outlier among the samples widens nothing. A sample on a ball's border is inside.

    Args:
        samples: ``[N, D]``.
        reference: ``[M, D]``.
        k: which neighbour gives the radius.

    Raises:
        ValueError: shapes that do not fit, no samples, or a reference of no more than k points.
    """
    for name, points, least in (("samples", samples, 0), ("reference", reference, k)):
        if len(points) <= least:
            raise ValueError(f"{name} must hold more than {least} points, got {len(points)}")
    squared_radii = _radii(reference, k)
    balls = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, columns, squared in _distance_tiles(samples, reference):
        inside = squared <= squared_radii[columns]
        balls[rows] += inside.sum(1)
        covered[columns] |= inside.any(0)
    return DensityCoverage(balls.double() / k, covered)


def _radii(points: Tensor, k: int) -> Tensor:
    """The squared distance ``[M]`` of each point to its k-th nearest neighbour; itself is none."""
    squared, _ = _nearest(points, points, k, exclude_self=True)
    return squared[:, -1]


def _in_manifold(queries: Tensor, points: Tensor, squared_radii: Tensor) -> Tensor:
    inside = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    for rows, columns, squared in _distance_tiles(queries, points):
        inside[rows] |= (squared <= squared_radii[columns]).any(1)
    return inside


def _nearest(queries: Tensor, points: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k least squared distances ``[N, k]`` in ascending order, and whose they are."""
    available = len(points) - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"k must be between 1 and the {available} points there are, got {k}")
    best = torch.full((len(queries), k), float("inf"), dtype=torch.float64, device=queries.device)
    indices = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for rows, columns, squared in _distance_tiles(queries, points):
        numbers = torch.arange(columns.start, columns.stop, device=queries.device).expand(len(squared), -1)
        if exclude_self:
            own = torch.arange(rows.start, rows.stop, device=queries.device)[:, None]
            squared = squared.masked_fill(numbers == own, float("inf"))
        candidates = torch.cat([best[rows], squared], 1)
        best[rows], position = candidates.topk(k, largest=False)
        indices[rows] = torch.cat([indices[rows], numbers], 1).gather(1, position)
    return best, indices


def _distance_tiles(queries: Tensor, points: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of some queries to some points, all pairs in turn, in float64."""
    if queries.ndim != 2 or points.ndim != 2 or queries.shape[1] != points.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {list(queries.shape)} and {list(points.shape)}")
    for rows in _spans(len(queries)):
        q = queries[rows].double()
        q_norms = q.square().sum(1, keepdim=True)
        for columns in _spans(len(points)):
            p = points[columns].double()
            norms = q_norms + p.square().sum(1)
            squared = norms - 2 * q @ p.T
            # What rounding leaves between equal vectors is no distance.
            yield rows, columns, squared.masked_fill(squared < 1e-13 * norms, 0.0)


def _spans(total: int) -> Iterator[slice]:
    for start in range(0, total, _TILE):
        yield slice(start, min(start + _TILE, total))
