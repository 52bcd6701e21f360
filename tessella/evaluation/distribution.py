"""How far one set of pictures is from another: Frechet distance, Inception-style score, precision and recall, ...

Every number comes as a record: with an interval, the feature network and the hash of its weights, the resize rule, the
pixels it saw, both sets and their sizes. Numbers compare only where all of these agree.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from tessella.data.base import Batch
from tessella.evaluation.bootstrap import Estimate, estimate, resamples
from tessella.evaluation.features import (
    FeatureCollector,
    FeatureNetwork,
    Features,
    PictureSet,
    metric_name,
    pictures_of,
)
from tessella.evaluation.frechet import frechet_distance, resampled_frechet, statistics_of
from tessella.evaluation.kernel import subset_distances
from tessella.evaluation.manifold import density_coverage, precision_recall
from tessella.evaluation.reference import ReferenceStatistics
from tessella.evaluation.score import inception_score, resampled_score
from tessella.storage import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from tessella.tokenizer import Tokenizer

logger = logging.getLogger("tessella")

Metric = Literal["frechet", "score", "precision_recall", "kernel", "density_coverage"]


@dataclass(frozen=True)
class DistributionSettings:
    """How sets of features are compared; stored in the record.

    Attributes:
        metrics: which ones: ``frechet``, ``score``, ``precision_recall``, ``kernel``, ``density_coverage``.
        num_splits: of the Inception-style score.
        k: neighbour that gives the radii of precision and recall.
        density_k: the same of density and coverage.
        num_subsets: of the kernel distance, which is their mean.
        subset_size: points of each at most.
        num_resamples: of the bootstrap; 0 gives no intervals.
        confidence: of the intervals.
        seed: of the bootstrap, and of the order that the score's splits are made in.
    """

    metrics: tuple[Metric, ...] = ("frechet", "score")
    num_splits: int = 10
    k: int = 3
    density_k: int = 5
    num_subsets: int = 100
    subset_size: int = 1000
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
        if min(self.density_k, self.num_subsets) < 1 or self.subset_size < 2:
            raise ValueError(
                "density_k and num_subsets must be at least 1 and subset_size at least 2, got "
                f"{self.density_k}, {self.num_subsets} and {self.subset_size}"
            )
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
        for name, found in self.values.items():
            interval = "" if found.interval is None else "{:.4g} to {:.4g}".format(*found.interval)
            table.add_row(name, f"{found.value:.4f}", interval)
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
            name("kernel"): "squared maximum mean discrepancy of pooled features, unbiased, kernel (x.y / D + 1)^3; "
            f"mean over {settings.num_subsets} subsets of at most {settings.subset_size} pictures; its interval is the "
            "spread of single subsets",
            name("density"): f"mean number of the reference's {settings.density_k}-nearest-neighbour balls that a "
            f"sample is in, over {settings.density_k}",
            name("coverage"): f"share of the reference's {settings.density_k}-nearest-neighbour balls with a sample",
            "interval": "spread over bootstrap resamples about the value, their bias removed: of the samples (recall, "
            "coverage: of the reference; all balls as they were, and for coverage the samples too)",
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
    beyond = [metric for metric in needed if metric != "frechet"]
    if isinstance(reference, ReferenceStatistics) and beyond:
        raise ValueError(
            f"{' and '.join(beyond)}: needs the reference's pictures or features; its mean and covariance do not do"
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
            values[name(metric)] = _mean(inside, settings, rng, most=1.0)
    if "kernel" in settings.metrics:
        assert isinstance(reference, Features)  # see _check_serves
        values[name("kernel")] = _kernel(samples.pool, reference.pool, settings, rng)
    if "density_coverage" in settings.metrics:
        assert isinstance(reference, Features)  # see _check_serves
        near = density_coverage(samples.pool, reference.pool, settings.density_k)
        values[name("density")] = _mean(near.densities, settings, rng)
        values[name("coverage")] = _mean(near.covered, settings, rng, most=1.0)
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
    counts = resamples(len(samples), settings.num_resamples, rng)
    resampled = _as_tensor(resampled_frechet(samples.pool, mean, covariance, counts))
    return estimate(value, resampled, settings.confidence, least=0.0)


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
    resampled = resampled_score(shuffled, settings.num_splits, settings.num_resamples, rng)
    return estimate(value, resampled, settings.confidence, least=1.0)


def _kernel(samples: Tensor, reference: Tensor, settings: DistributionSettings, rng: torch.Generator) -> Estimate:
    found = subset_distances(samples, reference, settings.num_subsets, settings.subset_size, rng)
    spread = found if settings.num_resamples else found[:0]
    return estimate(found.mean().item(), spread, settings.confidence, least=-float("inf"))


def _mean(each: Tensor, settings: DistributionSettings, rng: torch.Generator, most: float = float("inf")) -> Estimate:
    values = each.double()
    counts = resamples(len(values), settings.num_resamples, rng)
    resampled = _as_tensor((count.double() @ values).item() / len(values) for count in counts)
    return estimate(values.mean().item(), resampled, settings.confidence, least=0.0, most=most)


def _as_tensor(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
