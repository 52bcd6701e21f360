"""Features and statistics of a reference set, computed once and cached by the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tessella.data.base import Batch, Samples, SkipBudget
from tessella.data.loader import evaluation_batches
from tessella.evaluation.cache import cached_tensors
from tessella.evaluation.features import FeatureNetwork, Features, PictureCounter, PictureSet, pictures_of
from tessella.evaluation.frechet import FeatureStatistics


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
    dataset: Samples,
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
        batch_size: pictures at a time; 1 where ``dataset.extent`` is None.
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
    dataset: Samples,
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


def _pictures(dataset: Samples, batch_size: int, num_workers: int, num_images: int | None) -> Iterator[Tensor]:
    size = 1 if dataset.extent is None else batch_size
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
