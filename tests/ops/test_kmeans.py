"""k-means on points whose clusters are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessella.ops import kmeans
from tessella.ops.kmeans import _distortion, _lloyd


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(count: int, per_cluster: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    means = 10 * torch.randn(count, 3, generator=rng(seed))
    noise = 0.01 * torch.randn(count * per_cluster, 3, generator=rng(seed + 1))
    points = means.repeat_interleave(per_cluster, 0) + noise
    return means, points[torch.randperm(len(points), generator=rng(seed + 2))]


def test_separated_clusters_are_found() -> None:
    means, points = clusters(10, 30)
    centres = kmeans(points, 10, num_iterations=5, rng=rng())
    nearest = torch.cdist(means, centres).min(-1)
    assert nearest.values.max() < 0.05
    assert len(nearest.indices.unique()) == 10


def test_centres_are_means_of_their_cells() -> None:
    _, points = clusters(7, 20, seed=1)
    centres = kmeans(points, 4, num_iterations=50, rng=rng())
    cells = torch.cdist(points, centres).argmin(-1)
    for k in range(4):
        torch.testing.assert_close(points[cells == k].mean(0), centres[k])


def test_lloyd_by_hand() -> None:
    # Cells of 0 and 1: {0, 0.2}, {5, 6, 7}, means 0.1 and 6; then the cells stay as they are.
    points = torch.tensor([[0.0], [0.2], [5.0], [6.0], [7.0]])
    assert _lloyd(points, torch.tensor([[0.0], [1.0]]), 1)[:, 0].tolist() == pytest.approx([0.1, 6])
    assert _lloyd(points, torch.tensor([[0.0], [1.0]]), 100)[:, 0].tolist() == pytest.approx([0.1, 6])


def test_an_empty_cluster_takes_the_farthest_point() -> None:
    # The centre at 100 has no point; 9 is farthest from its centre, 0, whose cell still counts it in this iteration.
    points = torch.tensor([[0.0], [1.0], [9.0]])
    start = torch.tensor([[0.0], [100.0]])
    assert _lloyd(points, start, 1)[:, 0].tolist() == pytest.approx([10 / 3, 9])
    assert _lloyd(points, start, 100)[:, 0].tolist() == pytest.approx([0.5, 9])


@given(st.lists(st.integers(-50, 50), min_size=6, max_size=30, unique=True), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_no_cluster_is_empty(values: list[int], num_clusters: int, seed: int) -> None:
    points = torch.tensor(values, dtype=torch.float32)[:, None]
    centres = kmeans(points, num_clusters, num_iterations=100, rng=rng(seed))
    cells = torch.cdist(points, centres).argmin(-1)
    assert len(cells.unique()) == num_clusters


def test_restarts_keep_the_best_run() -> None:
    points = torch.rand(200, 2, generator=rng())
    shared = rng(3)
    runs = [_distortion(points, kmeans(points, 20, num_iterations=20, rng=shared)) for _ in range(5)]
    best = kmeans(points, 20, num_iterations=20, rng=rng(3), num_restarts=5)
    assert min(runs) < max(runs)
    assert _distortion(points, best) == min(runs)


def test_duplicates_are_finite() -> None:
    centres = kmeans(torch.ones(6, 2), 4, num_iterations=3, rng=torch.Generator())
    assert torch.equal(centres, torch.ones(4, 2))


@pytest.mark.parametrize("num_clusters", [0, 7])
def test_more_clusters_than_points_are_refused(num_clusters: int) -> None:
    with pytest.raises(ValueError, match=rf"num_clusters must lie in \[1, 6\].*got {num_clusters}"):
        kmeans(torch.ones(6, 2), num_clusters, num_iterations=3, rng=torch.Generator())
