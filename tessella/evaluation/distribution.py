"""How far one set of pictures is from another: Frechet distance, Inception-style score, precision and recall.

Every number comes as a record: with an interval, the feature network and the hash of its weights, the resize rule, the
pixels it saw, both sets and their sizes. Numbers compare only where all of these agree.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tessella.checkpoint import write_text
from tessella.data.base import Batch, ImageDataset, SkipBudget, evaluation_batches
from tessella.distributed import all_reduce_sum
from tessella.evaluation.cache import cached_tensors
from tessella.evaluation.features import (
    FeatureCollector,
    FeatureNetwork,
    Features,
    PictureCounter,
    PictureSet,
    metric_name,
    pictures_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from tessella.tokenizer import Tokenizer

logger = logging.getLogger("tessella")

Metric = Literal["frechet", "score", "precision_recall"]

_TILE = 2048  # rows and columns of the distances that exist at a time: 32 MiB of float64


# --- statistics -------------------------------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch, or process by process, in float64.

    Sums of squares about the running mean (Chan, Golub and LeVeque 1983) keep the digits that a difference of two large
    sums would lose. D^2 numbers, however many features were seen.

    Args:
        dim: D.
        device: where to keep them; that of the process group for :meth:`all_reduce`.

    Attributes:
        num_samples: N so far.
        mean: ``[D]``.
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        self.num_samples = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T

    def update(self, pool: Tensor) -> None:
        """Add the features ``pool [N, D]``.

        Raises:
            ValueError: not N rows of D.
        """
        if pool.ndim != 2 or pool.shape[1] != len(self.mean):
            raise ValueError(f"pool must be [N, {len(self.mean)}], got {list(pool.shape)}")
        if len(pool):
            rows = pool.to(self.mean)
            mean = rows.mean(0)
            self._add(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: FeatureStatistics) -> None:
        """Add what ``other`` has seen."""
        if other.num_samples:
            self._add(other.num_samples, other.mean.to(self.mean), other._scatter.to(self.mean))

    def all_reduce(self) -> None:
        """Add what all processes have seen; afterwards each holds the same. A process may have seen nothing."""
        total = int(all_reduce_sum(torch.tensor(self.num_samples, device=self.mean.device)))
        if total:
            mean = all_reduce_sum(self.mean * self.num_samples) / total
            shift = self.mean - mean
            self._scatter = all_reduce_sum(self._scatter + self.num_samples * shift.outer(shift))
            self.num_samples, self.mean = total, mean

    @property
    def covariance(self) -> Tensor:
        """``[D, D]``, the unbiased estimate: over N - 1.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.num_samples < 2:
            raise ValueError(f"a covariance needs at least two samples, got {self.num_samples}")
        return self._scatter / (self.num_samples - 1)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.num_samples + count
        shift = mean - self.mean
        self._scatter = self._scatter + scatter + shift.outer(shift) * (self.num_samples * count / total)
        self.mean = self.mean + shift * (count / total)
        self.num_samples = total


def statistics_of(pool: Tensor) -> FeatureStatistics:
    """The statistics of ``pool [N, D]``."""
    statistics = FeatureStatistics(pool.shape[1])
    statistics.update(pool)
    return statistics


# --- Frechet distance -------------------------------------------------------------------------------------------------


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    r"""Squared 2-Wasserstein distance between two Gaussians (Dowson and Landau 1982; Heusel et al., arXiv 1706.08500).

    .. math:: |m_1 - m_2|^2 + \mathrm{tr}(C_1) + \mathrm{tr}(C_2) - 2\,\mathrm{tr}\,(C_1 C_2)^{1/2}

    The trace of the root is the sum of the singular values of :math:`C_1^{1/2} C_2^{1/2}`, which exist for singular
    covariances too; no multiple of the identity is added.

    Args:
        mean_1, mean_2: ``[D]``.
        covariance_1, covariance_2: ``[D, D]``, symmetric and positive semi-definite; all is computed in float64.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    dim = len(mean_1)
    arguments = {"mean_1": mean_1, "covariance_1": covariance_1, "mean_2": mean_2, "covariance_2": covariance_2}
    for name, value in arguments.items():
        expected = [dim] if name.startswith("mean") else [dim, dim]
        if list(value.shape) != expected:
            raise ValueError(f"{name} must be {expected} as mean_1 has {dim} features, got {list(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    m_1, c_1, m_2, c_2 = (value.double() for value in arguments.values())
    trace_of_root = torch.linalg.svdvals(_root(c_1) @ _root(c_2)).sum()
    distance = (m_1 - m_2).square().sum() + c_1.trace() + c_2.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding can leave -1e-12


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _resampled_frechet(pool: Tensor, mean: Tensor, covariance: Tensor, counts: Iterator[Tensor]) -> Iterator[float]:
    """The distance to (mean, covariance) of each resample of ``pool [N, D]``, given as counts ``[N]``.

    With R the root of the reference's covariance, the eigenvalues of R C R are the squared singular values of the
    resample's centred rows times R, over N - 1: one product and one symmetric eigenproblem a resample.
    """
    x = pool.double() - mean
    norms = x.square().sum(1)
    projected = x @ _root(covariance)
    trace = covariance.trace()
    for count in counts:
        drawn = count.nonzero().squeeze(1)
        weights, total = count[drawn].double(), float(count.sum())
        shift = weights @ x[drawn] / total
        own_trace = (weights @ norms[drawn] - total * shift.square().sum()) / (total - 1)
        rows = projected[drawn]
        rows = (rows - weights @ rows / total) * weights.sqrt()[:, None]
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        root_trace = (torch.linalg.eigvalsh(gram).clamp(min=0) / (total - 1)).sqrt().sum()
        yield (shift.square().sum() + own_trace + trace - 2 * root_trace).item()


# --- Inception-style score --------------------------------------------------------------------------------------------


def inception_score(logits: Tensor, *, num_splits: int = 10) -> float:
    r"""``exp(mean_n KL(p(y|x_n) | p(y)))`` of each split; the mean over splits (Salimans et al., arXiv 1606.03498).

    Between 1 and the number of classes. Each split has its own marginal p(y); small splits give smaller values, so
    scores of different numbers of samples or splits do not compare. Splits are runs of rows: rows that are sorted by
    class must be shuffled first, as :func:`evaluate_distribution` does.

    Args:
        logits: ``[N, V]``.
        num_splits: S; split s is the rows from s N // S to (s + 1) N // S.

    Raises:
        ValueError: fewer rows than splits, or no split.
    """
    return sum(_score(*_entropy_terms(split)) for split in _splits(logits, num_splits)) / num_splits


def _splits(logits: Tensor, num_splits: int) -> Iterator[Tensor]:
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"num_splits must be between 1 and the {len(logits)} samples, got {num_splits}")
    for s in range(num_splits):
        yield logits[s * len(logits) // num_splits : (s + 1) * len(logits) // num_splits]


def _entropy_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``p [N, V]`` and ``sum_y p log p [N]``, float64."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return p, (p * log_p).sum(1)


def _score(p: Tensor, negative_entropy: Tensor) -> float:
    return float((negative_entropy.mean() + torch.special.entr(p.mean(0)).sum()).exp())


def _resampled_score(logits: Tensor, num_splits: int, num_resamples: int, rng: torch.Generator) -> Tensor:
    """Scores ``[num_resamples]``, each split resampled within itself."""
    total = torch.zeros(num_resamples, dtype=torch.float64)
    for split in _splits(logits, num_splits) if num_resamples else ():
        p, negative_entropy = _entropy_terms(split)
        weights = torch.stack(list(_resamples(len(split), num_resamples, rng))).double() / len(split)
        total += (weights @ negative_entropy + torch.special.entr(weights @ p).sum(1)).exp()
    return total / num_splits


# --- precision, recall, neighbours ------------------------------------------------------------------------------------


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


# --- intervals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap interval; None where no resamples were asked for."""

    value: float
    interval: tuple[float, float] | None


def _resamples(count: int, num_resamples: int, rng: torch.Generator) -> Iterator[Tensor]:
    """How often each of ``count`` samples is drawn, in ``count`` draws with replacement."""
    for _ in range(num_resamples):
        yield torch.randint(count, (count,), generator=rng).bincount(minlength=count)


def _estimate(value: float, resampled: Tensor, confidence: float, least: float, most: float = float("inf")) -> Estimate:
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


# --- reference statistics ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """What the Frechet distance needs of a reference set.

    Attributes:
        name: of the set.
        mean: ``[D]`` float64.
        covariance: ``[D, D]`` float64.
        num_images: how many pictures they are of; None where a published file does not say.
        fingerprint: of the pictures (:class:`~tessella.evaluation.features.PictureSet`), or of the published file.
        network: :meth:`FeatureNetwork.describe` of the network; None where a published file does not say.
    """

    name: str
    mean: Tensor
    covariance: Tensor
    num_images: int | None
    fingerprint: str
    network: dict[str, Any] | None


def reference_statistics(
    dataset: ImageDataset,
    network: FeatureNetwork,
    cache_folder: str | Path,
    *,
    name: str,
    batch_size: int = 64,
    num_images: int | None = None,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ReferenceStatistics:
    """Mean and covariance of a data set's features, computed once and then read from ``cache_folder``.

    A cache file belongs to the pictures themselves (their values, sizes and order as evaluation crops and resizes them,
    not the names or dates of files) and to all of :meth:`FeatureNetwork.describe`: weights, resize rule, pixels. So
    every call decodes the whole set to see which pictures it has, a few per cent of the time that their features take.
    Memory does not grow with the set. A file that is damaged is reported in the log and replaced.

    Args:
        dataset: the reference pictures.
        network: takes the features.
        cache_folder: made if it does not exist; safe to delete.
        name: what records call the set.
        batch_size: pictures at a time; 1 where ``dataset.crop_px`` is None.
        num_images: only so many, the first ones.
        num_workers: processes that decode.
        progress: called with the number of pictures whose features are taken, after each batch.

    Raises:
        DataError: pictures that cannot be used, more than :class:`SkipBudget` allows.
        ValueError: fewer pictures than ``num_images``, or fewer than two.
    """

    def pictures() -> Iterator[Tensor]:
        yield from _pictures(dataset, batch_size, num_workers, num_images)

    about = _about(pictures(), network)
    cache = Path(cache_folder)
    numbers = cached_tensors(cache, "reference", about, lambda: _streamed(pictures(), network, progress))
    return ReferenceStatistics(
        name, numbers["mean"], numbers["covariance"], about["num_images"], about["fingerprint"], network.describe()
    )


def reference_features(
    dataset: ImageDataset,
    network: FeatureNetwork,
    cache_folder: str | Path,
    *,
    batch_size: int = 64,
    num_images: int | None = None,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """The features of a data set, which precision, recall and neighbours need, cached as :func:`reference_statistics`.

    Memory and the file grow with the set: D + V numbers a picture.

    Args and errors: as for :func:`reference_statistics`.
    """

    def pictures() -> Iterator[Tensor]:
        yield from _pictures(dataset, batch_size, num_workers, num_images)

    def extract() -> dict[str, Tensor]:
        features = network.extract(pictures(), progress=progress)
        return {"pool": features.pool, "logits": features.logits}

    about = _about(pictures(), network)
    numbers = cached_tensors(Path(cache_folder), "features", about, extract)
    found = PictureSet(about["num_images"], about["sizes"], about["fingerprint"])
    return Features(numbers["pool"], numbers["logits"], found, network.describe())


def _pictures(dataset: ImageDataset, batch_size: int, num_workers: int, num_images: int | None) -> Iterator[Tensor]:
    size = batch_size if dataset.crop_px else 1
    batches = evaluation_batches(dataset, batch_size=size, num_workers=num_workers, limit=num_images)
    yield from pictures_of(_within_budget(batches), num_images)


def _about(pictures: Iterable[Tensor], network: FeatureNetwork) -> dict[str, Any]:
    """What a cache file belongs to: these very pictures, and the network with its protocol."""
    counter = PictureCounter()
    for x in pictures:
        counter.update(x)
    return {"network": network.describe(), **asdict(counter.picture_set())}


def _within_budget(batches: Iterable[Batch]) -> Iterator[Batch]:
    budget = SkipBudget()
    for batch in batches:
        budget.count(batch)
        yield batch
    budget.check()


def _streamed(
    pictures: Iterable[Tensor], network: FeatureNetwork, progress: Callable[[int], None] | None
) -> dict[str, Tensor]:
    statistics = FeatureStatistics(network.dim)
    for x in pictures:
        statistics.update(network(x).pool)
        if progress is not None:
            progress(statistics.num_samples)
    return {"mean": statistics.mean, "covariance": statistics.covariance}


# --- the record -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistributionSettings:
    """How sets of features are compared; stored in the record.

    Attributes:
        metrics: which ones: ``frechet``, ``score``, ``precision_recall``.
        num_splits: of the Inception-style score.
        k: neighbour that gives the radii of precision and recall.
        num_resamples: of the bootstrap; 0 gives no intervals.
        confidence: of the intervals.
        seed: of the bootstrap, and of the order that the score's splits are made in.
    """

    metrics: tuple[Metric, ...] = ("frechet", "score")
    num_splits: int = 10
    k: int = 3
    num_resamples: int = 100
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [metric for metric in self.metrics if metric not in get_args(Metric)]
        if unknown or not self.metrics:
            raise ValueError(f"metrics must be some of {', '.join(get_args(Metric))}, got {self.metrics!r}")
        if self.num_resamples < 0 or self.num_resamples == 1:
            raise ValueError(f"num_resamples must be 0 or at least 2, got {self.num_resamples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be above 0 and below 1, got {self.confidence}")
        if self.num_splits < 1 or self.k < 1:
            raise ValueError(f"num_splits and k must be at least 1, got {self.num_splits} and {self.k}")


@dataclass(frozen=True)
class DistributionRecord:
    """The result of :func:`evaluate_distribution`: the numbers, and all that makes them comparable.

    Attributes:
        values: by name (``FID``, ``IS``, ``precision``, ``recall``, or ``FD-EffLite0`` and so on).
        network: :meth:`FeatureNetwork.describe`.
        samples: which pictures were judged.
        reference: name, num_images and fingerprint of the set they were held against; None where none was needed.
        settings: how they were compared.
        seconds: wall-clock time, features included.
    """

    values: dict[str, Estimate]
    network: dict[str, Any]
    samples: PictureSet
    reference: dict[str, Any] | None
    settings: DistributionSettings
    seconds: float = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dictionaries: what the JSON holds."""
        return {**asdict(self), "meaning": self._meaning(), "protocol_line": self.protocol_line}

    def to_json(self) -> str:
        """Strict JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def write(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file that appears complete or not at all."""
        write_text(Path(path), self.to_json() + "\n")

    @property
    def protocol_line(self) -> str:
        """The protocol in one line, to stand beside the numbers wherever they are quoted."""
        network, settings = self.network, self.settings
        pixels = {"uint8": "8-bit pixels", "float": "float pixels"}[network["pixels"]]
        parts = [
            f"protocol {network['name']}",
            f"{network['network']} {network['weights_hash'][:8]}",
            f"{network['resize']} to {network['input_px']} px",
            pixels,
            f"{self.samples.num_images:,} samples {self.samples.fingerprint[:8]}",
        ]
        if self.reference is not None:
            count = self.reference["num_images"]
            pictures = "unstated number of pictures" if count is None else f"{count:,} pictures"
            parts.append(f"against {self.reference['name']}, {pictures} {self.reference['fingerprint'][:8]}")
        if "score" in settings.metrics:
            parts.append(f"{settings.num_splits} splits")
        if settings.num_resamples:
            parts.append(
                f"{settings.confidence:.0%} intervals of {settings.num_resamples} resamples, seed {settings.seed}"
            )
        return "; ".join(parts)

    def print(self, console: Console) -> None:
        """Show the numbers as a table, with the protocol below."""
        from rich.table import Table

        table = Table("metric", "value", "interval")
        for name, estimate in self.values.items():
            interval = "" if estimate.interval is None else "{:.4g} to {:.4g}".format(*estimate.interval)
            table.add_row(name, f"{estimate.value:.4f}", interval)
        console.print(table)
        console.print(self.protocol_line, style="dim", markup=False, highlight=False)

    def _meaning(self) -> dict[str, str]:
        """What each number means, in words, by its name."""
        settings, name = self.settings, partial(metric_name, label=self.network["label"])
        words = {
            name("frechet"): "Frechet distance of Gaussians fitted to pooled features (covariances over N - 1); "
            "biased upwards for few samples, so only equal numbers compare",
            name("score"): f"exp of the mean KL of p(y|x) to p(y); mean over {settings.num_splits} splits of the "
            "samples, shuffled by the seed",
            name("precision"): f"share of samples within the {settings.k}-nearest-neighbour balls of the reference",
            name("recall"): f"share of the reference within the {settings.k}-nearest-neighbour balls of the samples",
            "interval": "spread over bootstrap resamples about the value, their bias removed: of the samples (recall: "
            "of the reference, the samples' balls fixed; precision: the reference's balls fixed)",
        }
        return {key: text for key, text in words.items() if key in self.values or key == "interval"}


# --- entry points -----------------------------------------------------------------------------------------------------

Pictures = Iterable["Tensor | Batch"]


def evaluate_distribution(
    samples: Pictures | Features,
    reference: Pictures | Features | ReferenceStatistics | None,
    network: FeatureNetwork,
    *,
    settings: DistributionSettings | None = None,
    reference_name: str = "reference",
    num_samples: int | None = None,
    num_reference: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DistributionRecord:
    """Judge a set of pictures, generated or reconstructed, by its features.

    Args:
        samples: pictures ``x [B, 3, H, W]`` in [-1, 1] batch by batch, or their features.
        reference: the same of the pictures they are held against, or statistics of these (for the Frechet distance
            alone); None for the score alone.
        network: features' network and protocol.
        settings: which metrics, and how; the default is :class:`DistributionSettings`.
        reference_name: what the record calls the reference; statistics bring a name of their own.
        num_samples: take exactly so many samples.
        num_reference: take exactly so many of the reference.
        progress: called with the number of samples whose features are taken, after each batch.

    Raises:
        TypeError, ValueError: pictures that are none, fewer than asked for, features of another network, or a reference
            that does not serve the metrics.
    """
    started = time.perf_counter()
    settings = settings or DistributionSettings()
    _check_serves(reference, settings)
    sample_features = _features(samples, network, num_samples, "samples", progress)
    if reference is not None and not isinstance(reference, ReferenceStatistics):
        reference = _features(reference, network, num_reference, "reference", None)
    return _compare(sample_features, reference, network, settings, reference_name, started)


def evaluate_reconstruction_distribution(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    network: FeatureNetwork,
    *,
    settings: DistributionSettings | None = None,
    reference_name: str = "originals",
    num_images: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DistributionRecord:
    """Judge a tokenizer's reconstructions against their originals (rFID), in one pass over ``batches``.

    Args:
        tokenizer: encodes to indices and decodes from them, in eval mode; it is left in the mode it was in.
        batches: the originals.
        network: features' network and protocol.
        settings: as for :func:`evaluate_distribution`.
        reference_name: what the record calls the originals.
        num_images: take exactly so many.
        progress: called with the number of pictures done, after each batch.

    Raises:
        TypeError, ValueError: as of :func:`evaluate_distribution`.
    """
    started = time.perf_counter()
    settings = settings or DistributionSettings()
    originals, reconstructions = FeatureCollector(network), FeatureCollector(network)
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        for x in pictures_of(batches, num_images):
            indices = tokenizer.encode(x.to(tokenizer.device), pad=True)
            reconstructions.update(tokenizer.decode(indices, extent=x.shape[2:]))
            originals.update(x)
            if progress is not None:
                progress(originals.num_images)
    finally:
        tokenizer.train(was_training)
    return _compare(reconstructions.features(), originals.features(), network, settings, reference_name, started)


def _check_serves(reference: object, settings: DistributionSettings) -> None:
    needed = [metric for metric in settings.metrics if metric != "score"]
    if reference is None and needed:
        raise ValueError(f"{' and '.join(needed)} need a reference, and reference is None")
    if isinstance(reference, ReferenceStatistics) and "precision_recall" in needed:
        raise ValueError(
            "precision_recall needs the reference's pictures or features; its mean and covariance do not do"
        )


def _features(
    source: Pictures | Features,
    network: FeatureNetwork,
    num_images: int | None,
    argument: str,
    progress: Callable[[int], None] | None,
) -> Features:
    if not isinstance(source, Features):
        return network.extract(source, num_images=num_images, progress=progress)
    _check_network(source.network, network, argument)
    if num_images not in (None, len(source)):
        raise ValueError(f"{argument} are the features of {len(source)} pictures, and {num_images} were asked for")
    return source


def _check_network(description: dict[str, Any], network: FeatureNetwork, argument: str) -> None:
    own = network.describe()
    differing = [f"{key} {description[key]!r} and not {own[key]!r}" for key in own if description[key] != own[key]]
    if differing:
        raise ValueError(f"{argument} come from another network or protocol: {', '.join(differing)}")


def _compare(
    samples: Features,
    reference: Features | ReferenceStatistics | None,
    network: FeatureNetwork,
    settings: DistributionSettings,
    reference_name: str,
    started: float,
) -> DistributionRecord:
    name = partial(metric_name, label=network.protocol.label)
    rng = torch.Generator().manual_seed(settings.seed)
    values: dict[str, Estimate] = {}
    about: dict[str, Any] | None = None
    if isinstance(reference, Features):
        about = {"name": reference_name, **asdict(reference.pictures)}
    elif isinstance(reference, ReferenceStatistics):
        about = {key: getattr(reference, key) for key in ("name", "num_images", "fingerprint")}
    if "frechet" in settings.metrics:
        assert reference is not None  # see _check_serves
        values[name("frechet")] = _frechet(samples, reference, network, settings, rng)
    if "score" in settings.metrics:
        values[name("score")] = _shuffled_score(samples.logits, settings, rng)
    if "precision_recall" in settings.metrics:
        assert isinstance(reference, Features)  # see _check_serves
        coverage = precision_recall(samples.pool, reference.pool, settings.k)
        for metric, inside in (("precision", coverage.precise), ("recall", coverage.recalled)):
            values[name(metric)] = _share(inside, settings, rng)
    return DistributionRecord(
        values, network.describe(), samples.pictures, about, settings, time.perf_counter() - started
    )


def _frechet(
    samples: Features,
    reference: Features | ReferenceStatistics,
    network: FeatureNetwork,
    settings: DistributionSettings,
    rng: torch.Generator,
) -> Estimate:
    mean, covariance = _gaussian_of(reference, network)
    _warn_of_low_rank("samples", len(samples), network.dim)
    own = statistics_of(samples.pool)
    value = frechet_distance(own.mean, own.covariance, mean, covariance)
    resamples = _resamples(len(samples), settings.num_resamples, rng)
    resampled = _as_tensor(_resampled_frechet(samples.pool, mean, covariance, resamples))
    return _estimate(value, resampled, settings.confidence, least=0.0)


def _gaussian_of(reference: Features | ReferenceStatistics, network: FeatureNetwork) -> tuple[Tensor, Tensor]:
    if isinstance(reference, Features):
        _warn_of_low_rank("reference", len(reference), network.dim)
        statistics = statistics_of(reference.pool)
        return statistics.mean, statistics.covariance
    if reference.network is not None:
        _check_network(reference.network, network, "reference")
    if len(reference.mean) != network.dim:
        raise ValueError(
            f"reference {reference.name} has {len(reference.mean)} features, and the network of protocol "
            f"{network.protocol.name!r} {network.dim}"
        )
    if reference.num_images is not None:
        _warn_of_low_rank(f"reference {reference.name}", reference.num_images, network.dim)
    return reference.mean, reference.covariance


def _warn_of_low_rank(which: str, count: int, dim: int) -> None:
    if count <= dim:
        logger.warning(
            "%s: %d pictures give a covariance of %d features a rank of at most %d; a Frechet distance to it is far "
            "above that of many pictures, and compares only with others of as many",
            which, count, dim, count - 1,
        )  # fmt: skip


def _shuffled_score(logits: Tensor, settings: DistributionSettings, rng: torch.Generator) -> Estimate:
    shuffled = logits[torch.randperm(len(logits), generator=rng)]
    value = inception_score(shuffled, num_splits=settings.num_splits)
    resampled = _resampled_score(shuffled, settings.num_splits, settings.num_resamples, rng)
    return _estimate(value, resampled, settings.confidence, least=1.0)


def _share(inside: Tensor, settings: DistributionSettings, rng: torch.Generator) -> Estimate:
    share = inside.double()
    counts = _resamples(len(share), settings.num_resamples, rng)
    resampled = _as_tensor((count.double() @ share).item() / len(share) for count in counts)
    return _estimate(share.mean().item(), resampled, settings.confidence, least=0.0, most=1.0)


def _as_tensor(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
