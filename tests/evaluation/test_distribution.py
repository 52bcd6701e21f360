"""Distances between sets of features: by hand, in float64, against other implementations; what a record must say."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_tokenizer, write_pictures
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from tessella.data.base import Batch, DataError
from tessella.data.folder import Folder
from tessella.data.loader import evaluation_batches
from tessella.evaluation import manifold
from tessella.evaluation.backbones import Activations, Classifier
from tessella.evaluation.bootstrap import estimate, resamples
from tessella.evaluation.distribution import (
    DistributionRecord,
    DistributionSettings,
    evaluate_distribution,
    evaluate_reconstruction_distribution,
)
from tessella.evaluation.features import NETWORKS, FeatureNetwork, Features, PictureSet
from tessella.evaluation.frechet import FeatureStatistics, frechet_distance, resampled_frechet, statistics_of
from tessella.evaluation.kernel import kernel_distance, subset_distances
from tessella.evaluation.manifold import density_coverage, nearest_neighbours, precision_recall
from tessella.evaluation.protocols import EFFLITE0
from tessella.evaluation.reference import ReferenceStatistics, reference_statistics
from tessella.evaluation.score import inception_score, resampled_score

WORLD = 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count: int, dim: int, seed: int = 0) -> Tensor:
    return normal(count, dim, seed=seed) @ normal(dim, dim, seed=seed + 1) + normal(dim, seed=seed + 2)


# --- statistics -------------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, 30), max_size=4).map(sorted), seed=st.integers(0, 5))
def test_statistics_in_pieces(cuts: list[int], seed: int) -> None:
    pool = correlated(30, 4, seed) + 1e4  # far from 0: differences of large sums would lose half the digits
    updated, merged = FeatureStatistics(4), FeatureStatistics(4)
    for start, stop in zip([0, *cuts], [*cuts, 30], strict=True):
        updated.update(pool[start:stop])
        merged.merge(statistics_of(pool[start:stop]))
    for statistics in (updated, merged):
        assert statistics.num_samples == 30
        np.testing.assert_allclose(statistics.mean, pool.numpy().mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics.covariance, np.cov(pool.numpy(), rowvar=False), rtol=1e-8)


def test_statistics_are_float64_of_float32() -> None:
    pool = correlated(50, 3).float()
    statistics = statistics_of(pool)
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    torch.testing.assert_close(statistics.covariance, pool.double().T.cov(), rtol=1e-12, atol=0)


def test_statistics_errors() -> None:
    with pytest.raises(ValueError, match=r"pool must be \[N, 3\], got \[2, 4\]"):
        FeatureStatistics(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        _ = statistics_of(torch.zeros(1, 3)).covariance


def reduce_statistics(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    uneven, one_sided = FeatureStatistics(3), FeatureStatistics(3)
    uneven.update(correlated(20, 3)[:6] if rank == 0 else correlated(20, 3)[6:])
    one_sided.update(correlated(20, 3) if rank == 1 else torch.empty(0, 3))
    for statistics in (uneven, one_sided):
        statistics.all_reduce()
    state = [[s.num_samples, s.mean, s.covariance] for s in (uneven, one_sided)]
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_statistics_over_processes(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=reduce_statistics, args=(rank, str(tmp_path)), daemon=True) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    whole = statistics_of(correlated(20, 3))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    for state, other in zip(first, second, strict=True):
        assert state[0] == other[0] == 20
        assert torch.equal(state[1], other[1])
        assert torch.equal(state[2], other[2])
        torch.testing.assert_close(state[1], whole.mean)
        torch.testing.assert_close(state[2], whole.covariance)


# --- Frechet distance -------------------------------------------------------------------------------------------------


def test_frechet_by_hand() -> None:
    """Variances along the axes: (3 - 0)^2 + (1 - 0)^2 for the means, (2 - 1)^2 + (3 - 5)^2 for the deviations."""
    mean, covariance = torch.tensor([3.0, 1.0]), torch.diag(torch.tensor([4.0, 9.0]))
    other = torch.diag(torch.tensor([1.0, 25.0]))
    assert frechet_distance(mean, covariance, torch.zeros(2), other) == pytest.approx(9 + 1 + 1 + 4)


def gaussians(count: int, dim: int, seed: int) -> tuple[FeatureStatistics, FeatureStatistics]:
    return statistics_of(correlated(count, dim, seed)), statistics_of(correlated(count + 5, dim, seed + 10))


@pytest.mark.parametrize(("count", "dim"), [(200, 6), (40, 12)])
def test_frechet_against_scipy(count: int, dim: int) -> None:
    a, b = gaussians(count, dim, 0)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    ours = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert ours == pytest.approx(float(expected), rel=1e-10)


def test_frechet_of_singular_covariances() -> None:
    """Of rank 1, along u and v: (s - t)^2 along one axis if u = v, s^2 + t^2 if they are orthogonal."""
    u, v = torch.eye(5)[0], torch.eye(5)[3]
    zero = torch.zeros(5)
    assert frechet_distance(zero, 4 * u.outer(u), zero, 9 * u.outer(u)) == pytest.approx(1)
    assert frechet_distance(zero, 4 * u.outer(u), zero, 9 * v.outer(v)) == pytest.approx(13)


@given(seed=st.integers(0, 50), count=st.integers(3, 12))
def test_frechet_properties(seed: int, count: int) -> None:
    """Zero to itself, symmetric, unmoved by rotations; of few samples too, whose covariances are singular."""
    a, b = gaussians(count, 6, seed)
    distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    scale = float(a.covariance.trace() + b.covariance.trace())
    assert distance >= 0
    assert frechet_distance(a.mean, a.covariance, a.mean, a.covariance) == pytest.approx(0, abs=1e-7 * scale)
    assert frechet_distance(b.mean, b.covariance, a.mean, a.covariance) == pytest.approx(distance, abs=1e-7 * scale)
    q, _ = torch.linalg.qr(normal(6, 6, seed=seed))
    rotated = frechet_distance(q @ a.mean, q @ a.covariance @ q.T, q @ b.mean, q @ b.covariance @ q.T)
    assert rotated == pytest.approx(distance, abs=1e-7 * scale)


def test_frechet_errors() -> None:
    zero, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"covariance_2 must be \[3, 3\] as mean_1 has 3 features, got \[2, 2\]"):
        frechet_distance(zero, eye, zero, torch.eye(2))
    with pytest.raises(ValueError, match="mean_2 holds NaN"):
        frechet_distance(zero, eye, zero * math.nan, eye)


class Flatten(nn.Module):
    """Stands in for a feature network where another implementation asks for one: pixels as features."""

    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all extracted features:UserWarning")
def test_frechet_and_score_agree_with_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore

    torch.manual_seed(0)
    real, fake = torch.rand(60, 3, 2, 2), torch.rand(50, 3, 2, 2) ** 2
    fid = FrechetInceptionDistance(feature=Flatten(), normalize=True, input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    a, b = statistics_of(real.flatten(1)), statistics_of(fake.flatten(1))
    assert frechet_distance(a.mean, a.covariance, b.mean, b.covariance) == pytest.approx(fid.compute().item(), rel=1e-4)
    score = InceptionScore(feature=Flatten(), splits=2)
    score.update(4 * fake)
    torch.manual_seed(1)
    expected = score.compute()[0].item()
    torch.manual_seed(1)
    order = torch.randperm(50)  # it draws one before it splits
    assert inception_score(4 * fake.flatten(1)[order], num_splits=2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("count", "dim"), [(60, 8), (20, 30)])
def test_resampled_frechet_is_the_distance_of_the_resample(count: int, dim: int) -> None:
    """Both where there are more samples than features and where there are fewer."""
    pool, reference = correlated(count, dim), statistics_of(correlated(90, dim, 5))
    rng = torch.Generator().manual_seed(0)
    counts = [torch.ones(count, dtype=torch.int64), *resamples(count, 3, rng)]
    resampled = list(resampled_frechet(pool, reference.mean, reference.covariance, iter(counts)))
    for found, drawn in zip(resampled, counts, strict=True):
        own = statistics_of(pool.repeat_interleave(drawn, 0))
        expected = frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)
        assert found == pytest.approx(expected, rel=1e-6)


# --- score ------------------------------------------------------------------------------------------------------------


def test_score_by_hand() -> None:
    certain = 100 * torch.eye(4).repeat(3, 1)  # each class three times, without doubt
    assert inception_score(certain, num_splits=1) == pytest.approx(4)
    assert inception_score(certain, num_splits=3) == pytest.approx(4)  # each split holds every class
    assert inception_score(certain.sort(0).values, num_splits=1) == pytest.approx(4 / 4)
    assert inception_score(torch.zeros(10, 4)) == pytest.approx(1)  # no picture is told from any other
    # Two classes, p = 3/4 and 1/4 and the other way round: exp(ln 2 - H(1/4)).
    hesitant = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert inception_score(hesitant, num_splits=1) == pytest.approx(math.exp(math.log(2) - entropy))


def test_score_of_uneven_splits() -> None:
    """Seven rows in two splits: three and four."""
    logits = normal(7, 5)
    parts = [inception_score(part, num_splits=1) for part in (logits[:3], logits[3:])]
    assert inception_score(logits, num_splits=2) == pytest.approx(sum(parts) / 2)
    for wrong in (0, 8):
        with pytest.raises(ValueError, match=f"between 1 and the 7 samples, got {wrong}"):
            inception_score(logits, num_splits=wrong)


def test_resampled_score_is_the_score_of_the_resample() -> None:
    logits = normal(21, 5)
    found = resampled_score(logits, 2, 3, torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    halves = [(half, list(resamples(len(half), 3, rng))) for half in (logits[:10], logits[10:])]
    for resample in range(3):
        parts = [half.repeat_interleave(counts[resample], 0) for half, counts in halves]
        expected = sum(inception_score(part, num_splits=1) for part in parts) / 2
        assert found[resample].item() == pytest.approx(expected)


# --- precision, recall, neighbours ------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_TILE", 7)


def test_precision_and_recall_by_hand() -> None:
    """On a line, k = 1: reference balls [-1, 1], [0, 2], [8, 12] of 0, 1, 10 and so on."""
    reference = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # radii 1, 1, 2, 2
    samples = torch.tensor([[2.0], [2.5], [7.9], [8.0]])  # radii 1/2, 1/2, 1/10, 1/10
    coverage = precision_recall(samples, reference, k=1)
    assert coverage.precise.tolist() == [True, False, False, True]
    assert coverage.recalled.tolist() == [False, False, False, False]
    assert (coverage.precision, coverage.recall) == (0.5, 0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_all_pairs(k: int) -> None:
    samples, reference = normal(30, 4), 1.3 * normal(23, 4, seed=1) + 1
    coverage = precision_recall(samples, reference, k)

    def inside(queries: Tensor, points: Tensor) -> Tensor:
        radii = torch.cdist(points, points).sort(1).values[:, k]
        return (torch.cdist(queries, points) <= radii).any(1)

    assert torch.equal(coverage.precise, inside(samples, reference))
    assert torch.equal(coverage.recalled, inside(reference, samples))
    assert 0 < coverage.precision < 1
    assert 0 < coverage.recall < 1


def test_kernel_distance_by_hand() -> None:
    """One feature: kernels of 0 with 1 are 1, of 2 with 3 are 343, and between the sets 1, 1, 27, 64."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    assert kernel_distance(x, y) == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)
    with pytest.raises(ValueError, match=r"at least two points, got \[2, 1\] and \[1, 1\]"):
        kernel_distance(x, y[:1])


def test_kernel_distance_has_no_bias() -> None:
    found = subset_distances(normal(400, 6), normal(400, 6, seed=1), 200, 20, torch.Generator().manual_seed(0))
    assert abs(found.mean().item()) < 3 * found.std().item() / math.sqrt(20)  # 400 / 20 subsets are independent
    assert found.min() < 0 < found.max()
    assert subset_distances(normal(9, 6), normal(30, 6) + 3, 2, 1000, torch.Generator().manual_seed(0)).min() > 1


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features:UserWarning")
def test_kernel_distance_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    torch.manual_seed(0)
    real, fake = torch.rand(40, 3, 2, 2), torch.rand(40, 3, 2, 2) ** 2
    kid = KernelInceptionDistance(feature=Flatten(), subsets=1, subset_size=40, normalize=True)
    kid.update(real, real=True)
    kid.update(fake, real=False)
    expected = kid.compute()[0].item()
    assert expected > 0.1
    assert kernel_distance(fake.flatten(1), real.flatten(1)) == pytest.approx(expected, rel=1e-4)


def test_density_and_coverage_by_hand() -> None:
    """On a line, k = 1: reference balls [-1, 1], [0, 2], [8, 12], [10, 14]."""
    reference = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    near = density_coverage(torch.tensor([[0.5], [2.0], [7.9], [100.0]]), reference, k=1)
    assert near.densities.tolist() == [2, 1, 0, 0]
    assert near.covered.tolist() == [True, True, False, False]
    assert (near.density, near.coverage) == (0.75, 0.5)
    with pytest.raises(ValueError, match="reference must hold more than 4 points, got 4"):
        density_coverage(reference, reference, k=4)


@pytest.mark.usefixtures("small_tiles")
def test_density_and_coverage_against_all_pairs() -> None:
    samples, reference = normal(30, 4), 1.3 * normal(23, 4, seed=1) + 1
    near = density_coverage(samples, reference, 5)
    radii = torch.cdist(reference, reference).sort(1).values[:, 5]
    inside = torch.cdist(samples, reference) <= radii
    torch.testing.assert_close(near.densities, inside.double().sum(1) / 5)
    assert torch.equal(near.covered, inside.any(0))
    assert 0 < near.coverage < 1


@pytest.mark.usefixtures("small_tiles")
def test_precision_and_recall_at_their_ends() -> None:
    points = normal(20, 5)
    same, apart = precision_recall(points, points.flip(0)), precision_recall(points, points + 100)
    assert (same.precision, same.recall) == (1, 1)
    assert (apart.precision, apart.recall) == (0, 0)
    # Copies of one point: every ball has radius 0 and holds exactly that point.
    copies = (normal(1, 1000) / 3 + 30).expand(40, -1)
    assert manifold._radii(copies, 3).tolist() == [0] * 40  # exactly, whatever |x|^2 - 2 x.x + |x|^2 rounds to
    assert precision_recall(copies[:13], copies).precision == 1
    assert precision_recall(copies + 1e-3, copies).precision == 0
    with pytest.raises(ValueError, match="reference must hold more than k = 3 points, got 3"):
        precision_recall(points, points[:3])


@pytest.mark.usefixtures("small_tiles")
@given(st.integers(1, 20), st.integers(3, 20), st.integers(1, 3), st.integers(0, 3))
def test_neighbours_against_all_pairs(num_queries: int, num_points: int, k: int, seed: int) -> None:
    queries, points = normal(num_queries, 3, seed=seed), normal(num_points, 3, seed=seed + 1)
    distances, indices = nearest_neighbours(queries, points, k)
    expected = torch.cdist(queries, points).sort(1)
    torch.testing.assert_close(distances, expected.values[:, :k])
    assert torch.equal(indices, expected.indices[:, :k])


def test_a_copy_of_a_training_picture_is_at_distance_zero() -> None:
    train = (normal(50, 64) + 30).float()
    found = nearest_neighbours(train[[17, 3]] + torch.tensor([[0.0], [1e-3]]), train)
    assert found.indices.tolist() == [[17], [3]]
    assert found.distances[0, 0].item() == 0
    assert found.distances[1, 0].item() == pytest.approx(1e-3 * 8, rel=1e-2)
    with pytest.raises(ValueError, match="k must be between 1 and the 50 points there are, got 51"):
        nearest_neighbours(train, train, 51)
    with pytest.raises(ValueError, match=r"\[N, D\] and \[M, D\], got \[50, 64\] and \[50, 63\]"):
        nearest_neighbours(train, train[:, 1:])


# --- records of features ----------------------------------------------------------------------------------------------


class TinyClassifier(Classifier):
    """Stands in for a network: its features are 12 fixed projections of the picture, its logits 20."""

    dim = 12
    num_classes = 20
    input_px = 8

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Linear(3 * 8 * 8, self.dim)
        self.fc = nn.Linear(self.dim, self.num_classes)
        self.freeze()

    def forward(self, x: Tensor) -> Activations:
        pool = self.pool(x.flatten(1))
        return Activations(pool, 5 * self.fc(pool))


@functools.cache
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, EFFLITE0.network, TinyClassifier)
        return FeatureNetwork(EFFLITE0, TinyClassifier())


def features(count: int, *, seed: int = 0) -> Features:
    """Features out of the air."""
    pictures = PictureSet(count, {"16x16": count}, f"{seed:016x}")
    pool, logits = normal(count, 12, seed=seed), 3 * normal(count, 20, seed=seed + 1)
    return Features(pool.float(), logits.float(), pictures, network().describe())


ALL = DistributionSettings(
    metrics=("frechet", "score", "precision_recall", "kernel", "density_coverage"), num_resamples=10
)


def test_record() -> None:
    samples, reference = features(40), features(30, seed=2)
    record = evaluate_distribution(samples, reference, network(), settings=ALL, reference_name="held out")
    names = ("FD", "IS", "precision", "recall", "KD", "density", "coverage")
    assert list(record.values) == [f"{name}-EffLite0" for name in names]
    a, b = statistics_of(samples.pool), statistics_of(reference.pool)
    expected = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert record.values["FD-EffLite0"].value == pytest.approx(expected)
    coverage = precision_recall(samples.pool, reference.pool)
    assert record.values["precision-EffLite0"].value == coverage.precision
    assert record.values["recall-EffLite0"].value == coverage.recall
    near = density_coverage(samples.pool, reference.pool)
    assert record.values["density-EffLite0"].value == pytest.approx(near.density)
    assert record.values["coverage-EffLite0"].value == near.coverage
    # 100 subsets of all 30 of the reference and 30 of the 40 samples.
    assert record.values["KD-EffLite0"].value == pytest.approx(
        kernel_distance(samples.pool[:30], reference.pool), abs=0.3
    )
    for found in record.values.values():
        assert found.interval is not None
        assert found.interval[0] <= found.value <= found.interval[1]
    stored = json.loads(record.to_json())
    assert stored["network"] == network().describe()
    assert stored["samples"] == {"num_images": 40, "sizes": {"16x16": 40}, "fingerprint": "0" * 16}
    assert stored["reference"] == {
        "name": "held out", "num_images": 30, "sizes": {"16x16": 30}, "fingerprint": f"{2:016x}",
    }  # fmt: skip
    assert stored["settings"] == {**dataclasses.asdict(ALL), "metrics": list(ALL.metrics)}
    assert set(stored["meaning"]) == {*record.values, "interval"}
    assert record.protocol_line == (
        f"protocol efflite0; efficientnet_lite0 {network().weights_hash[:8]}; bicubic_pil to 8 px; 8-bit pixels; "
        "40 samples 00000000; against held out, 30 pictures 00000000; 10 splits; "
        "95% intervals of 10 resamples, seed 0"
    )


def test_record_is_written_and_printed(tmp_path: Path) -> None:
    record = evaluate_distribution(features(20), None, network(), settings=dataclasses.replace(ALL, metrics=("score",)))
    record.write(tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text()) == record.to_dict() | {
        "values": json.loads(record.to_json())["values"], "settings": json.loads(record.to_json())["settings"],
    }  # fmt: skip
    console = Console(width=200)
    with console.capture() as capture:
        record.print(console)
    assert f"{record.values['IS-EffLite0'].value:.4f}" in capture.get()
    assert "protocol efflite0" in capture.get()


def test_seed_decides_the_intervals_and_not_the_distance() -> None:
    def run(seed: int) -> DistributionRecord:
        return evaluate_distribution(
            features(40), features(30, seed=2), network(), settings=dataclasses.replace(ALL, seed=seed)
        )

    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert first.values["FD-EffLite0"].value == other.values["FD-EffLite0"].value
    assert first.values["FD-EffLite0"].interval != other.values["FD-EffLite0"].interval


def test_no_resamples_no_intervals() -> None:
    settings = dataclasses.replace(ALL, num_resamples=0)
    record = evaluate_distribution(features(20), features(20, seed=2), network(), settings=settings)
    assert {estimate.interval for estimate in record.values.values()} == {None}
    assert "resamples" not in record.protocol_line


def test_interval_is_as_wide_as_the_distance_varies_between_sample_sets() -> None:
    """Of 40 independent sets, the deviation of the distance, against the one that the resamples of one set show."""
    reference = statistics_of(normal(500, 4, seed=99))
    sets = [normal(150, 4, seed=seed) * 1.2 + 0.1 for seed in range(40)]
    own = [statistics_of(pool) for pool in sets]
    values = [frechet_distance(s.mean, s.covariance, reference.mean, reference.covariance) for s in own]
    true_deviation = torch.tensor(values).std().item()
    shown = []
    for pool in sets[:10]:
        counts = resamples(150, 50, torch.Generator().manual_seed(0))
        shown.append(torch.tensor(list(resampled_frechet(pool, reference.mean, reference.covariance, counts))).std())
    assert torch.stack(shown).mean().item() == pytest.approx(true_deviation, rel=0.35)


def test_interval_about_the_value() -> None:
    resampled = torch.arange(101.0, dtype=torch.float64) + 500  # biased by far; 5 % lie below 505
    found = estimate(7.0, resampled, confidence=0.9, least=0.0)
    assert found.interval == pytest.approx((0.0, 7 + 45))


def test_score_does_not_depend_on_the_order_of_classes() -> None:
    """Samples sorted by class: in their own order each split would hold a single class, and the score would be 1."""
    sorted_by_class = features(400)
    sorted_by_class = dataclasses.replace(sorted_by_class, logits=50 * torch.eye(20)[torch.arange(400) // 40])
    record = evaluate_distribution(
        sorted_by_class, None, network(), settings=DistributionSettings(("score",), num_resamples=0)
    )
    assert inception_score(sorted_by_class.logits) == pytest.approx(1)
    assert record.values["IS-EffLite0"].value > 8


def test_low_rank_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    settings = DistributionSettings(("frechet",), num_resamples=0)
    with caplog.at_level(logging.WARNING, "tessella"):
        evaluate_distribution(features(8), features(12, seed=1), network(), settings=settings)
    messages = [record.message for record in caplog.records]
    assert any(text.startswith("reference: 12 pictures") and "rank of at most 11" in text for text in messages)
    assert any(text.startswith("samples: 8 pictures") and "rank of at most 7" in text for text in messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tessella"):
        evaluate_distribution(features(13), features(13, seed=1), network(), settings=settings)
    assert not caplog.records


def unknown_reference(dim: int = 12, description: dict[str, Any] | None = None) -> ReferenceStatistics:
    zero, eye = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    return ReferenceStatistics("published", zero, eye, None, "f" * 16, description)


def test_published_statistics_as_reference() -> None:
    settings = DistributionSettings(("frechet",), num_resamples=0)
    record = evaluate_distribution(features(20), unknown_reference(), network(), settings=settings)
    assert record.reference == {"name": "published", "num_images": None, "fingerprint": "f" * 16}
    assert "against published, unstated number of pictures" in record.protocol_line
    with pytest.raises(ValueError, match=r"published has 2048 features, and the network of protocol 'efflite0' 12"):
        evaluate_distribution(features(20), unknown_reference(2048), network(), settings=settings)
    other = {**network().describe(), "resize": "bilinear"}
    with pytest.raises(ValueError, match=r"reference come from another .*: resize 'bilinear' and not 'bicubic_pil'"):
        evaluate_distribution(features(20), unknown_reference(description=other), network(), settings=settings)


def test_errors() -> None:
    with pytest.raises(ValueError, match="frechet need a reference, and reference is None"):
        evaluate_distribution(features(20), None, network())
    with pytest.raises(
        ValueError, match="precision_recall and kernel and density_coverage: needs the reference's pictures or features"
    ):
        evaluate_distribution(features(20), unknown_reference(), network(), settings=ALL)
    foreign = dataclasses.replace(features(20), network={**network().describe(), "weights_hash": "0"})
    with pytest.raises(ValueError, match="samples come from another network or protocol: weights_hash '0' and not"):
        evaluate_distribution(foreign, features(20), network())
    with pytest.raises(ValueError, match="samples are the features of 20 pictures, and 30 were asked for"):
        evaluate_distribution(features(20), features(20), network(), num_samples=30)
    with pytest.raises(ValueError, match="num_splits must be between 1 and the 5 samples, got 10"):
        evaluate_distribution(features(5), None, network(), settings=DistributionSettings(("score",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"metrics": ("fid",)},
            r"metrics must be some of frechet, score, precision_recall, kernel, density_coverage, got \('fid',\)",
        ),
        ({"metrics": ()}, r"metrics must be some of"),
        ({"num_resamples": 1}, "num_resamples must be 0 or at least 2, got 1"),
        ({"confidence": 1.0}, r"confidence must be above 0 and below 1, got 1\.0"),
        ({"num_splits": 0}, "num_splits and k must be at least 1, got 0 and 3"),
    ],
)
def test_settings_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributionSettings(**values)


# --- records of pictures ----------------------------------------------------------------------------------------------

QUICK = DistributionSettings(("frechet", "score"), num_splits=2, num_resamples=2)


@pytest.fixture
def dataset(tmp_path: Path) -> Folder:
    return Folder(write_pictures(tmp_path / "pictures", 12), split="train", crop_px=16)


def test_pictures_and_features_give_one_record(dataset: Folder) -> None:
    x = torch.cat([batch["x"] for batch in evaluation_batches(dataset, batch_size=4)])
    done: list[int] = []
    of_pictures = evaluate_distribution(
        [x.flip(3)], evaluation_batches(dataset, batch_size=4), network(), settings=QUICK, num_samples=8,
        num_reference=9, progress=done.append,
    )  # fmt: skip
    of_features = evaluate_distribution(
        network().extract([x[:8].flip(3)]), network().extract([x[:9]]), network(), settings=QUICK
    )
    for name, found in of_pictures.values.items():
        assert found.value == pytest.approx(of_features.values[name].value, rel=1e-4)
    assert of_pictures.samples == of_features.samples
    assert of_pictures.reference == of_features.reference
    assert done == [8]
    with pytest.raises(ValueError, match="num_images=13 pictures were asked for, and batches held"):
        evaluate_distribution([x], [x], network(), settings=QUICK, num_reference=13)


def test_reconstructions_are_judged_as_samples_are(dataset: Folder) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.train()

    def batches() -> Iterator[Batch]:
        return evaluation_batches(dataset, batch_size=4)

    record = evaluate_reconstruction_distribution(tokenizer, batches(), network(), settings=QUICK, num_images=8)
    assert tokenizer.training
    tokenizer.eval()
    decoded = [tokenizer.decode(tokenizer.encode(batch["x"])) for batch in batches()]
    expected = evaluate_distribution(
        decoded, batches(), network(), settings=QUICK, num_samples=8, num_reference=8, reference_name="originals"
    )
    assert record == expected
    assert record.reference is not None
    assert record.reference["num_images"] == 8


# --- cached reference statistics --------------------------------------------------------------------------------------


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of each batch that a network looks at."""
    calls: list[int] = []
    original = FeatureNetwork.__call__

    def counted(self: FeatureNetwork, x: Tensor) -> Any:
        calls.append(len(x))
        return original(self, x)

    monkeypatch.setattr(FeatureNetwork, "__call__", counted)
    return calls


def test_reference_is_computed_once(dataset: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    first = reference_statistics(dataset, network(), tmp_path / "cache", name="train", batch_size=4)
    assert sum(calls) == len(dataset)
    again = reference_statistics(dataset, network(), tmp_path / "cache", name="other name", batch_size=5)
    assert sum(calls) == len(dataset)
    assert (first.name, again.name) == ("train", "other name")
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.covariance, again.covariance)
    own = statistics_of(network().extract(evaluation_batches(dataset, batch_size=4)).pool)
    torch.testing.assert_close(first.covariance, own.covariance)
    assert first.num_images == len(dataset)
    assert first.network == network().describe()
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".safetensors"]  # nothing half-written is left


def test_reference_belongs_to_pictures_and_network(
    dataset: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    monkeypatch.setitem(NETWORKS, EFFLITE0.network, TinyClassifier)
    other_rule = FeatureNetwork(dataclasses.replace(EFFLITE0, resize="tf1_bilinear"), network().classifier)
    smaller = Folder(dataset.path, split="train", crop_px=12)
    cases = [
        (dataset, network(), None),
        (dataset, other_rule, None),
        (smaller, network(), None),
        (dataset, network(), 8),
    ]
    for _ in range(2):
        found = [
            reference_statistics(d, n, tmp_path / "cache", name="train", num_images=count) for d, n, count in cases
        ]
        assert sum(calls) == 3 * len(dataset) + 8
    assert len({float(reference.covariance.trace()) for reference in found}) == 4
    assert [reference.num_images for reference in found] == [len(dataset)] * 3 + [8]


def flip_a_bit(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"x" * 100]
)
def test_a_damaged_reference_is_named_and_computed_again(
    damage: Any, dataset: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = reference_statistics(dataset, network(), tmp_path / "cache", name="train")
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING, "tessella"):
        again = reference_statistics(dataset, network(), tmp_path / "cache", name="train")
    assert [str(file) in record.message and "computed again" in record.message for record in caplog.records] == [True]
    assert torch.equal(again.covariance, good.covariance)
    assert file.read_bytes() == content


def test_a_reference_of_something_else_under_the_name_is_not_trusted(
    dataset: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference_statistics(dataset, network(), tmp_path, name="train", num_images=5)
    (of_five,) = tmp_path.glob("*.safetensors")
    content = of_five.read_bytes()
    whole = reference_statistics(dataset, network(), tmp_path, name="train")
    (of_all,) = set(tmp_path.glob("*.safetensors")) - {of_five}
    of_all.write_bytes(content)
    with caplog.at_level(logging.WARNING, "tessella"):
        again = reference_statistics(dataset, network(), tmp_path, name="train")
    assert "it is of other pictures or another network" in caplog.text
    assert torch.equal(again.covariance, whole.covariance)


def test_reference_of_too_few_or_broken_pictures(dataset: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images=99 pictures were asked for, and batches held"):
        reference_statistics(dataset, network(), tmp_path / "cache", name="train", num_images=99)
    for file in sorted((tmp_path / "pictures").rglob("*.png"))[:6]:
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be used"):
        reference_statistics(dataset, network(), tmp_path / "cache", name="train")
    assert not (tmp_path / "cache").exists()


def test_pictures_are_forgotten_once_their_features_are_taken() -> None:
    kept: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[Tensor]:
        nonlocal most
        rng = torch.Generator().manual_seed(0)
        for _ in range(12):
            x = torch.rand(4, 3, 16, 16, generator=rng) * 2 - 1
            kept.append(weakref.ref(x))
            yield x
            del x
            most = max(most, sum(ref() is not None for ref in kept))

    assert len(network().extract(batches())) == 48
    assert most <= 2
