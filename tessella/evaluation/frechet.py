"""Mean and covariance of features, and the Frechet distance between two such pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessella.distributed import all_reduce_sum


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


def resampled_frechet(pool: Tensor, mean: Tensor, covariance: Tensor, counts: Iterator[Tensor]) -> Iterator[float]:
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
