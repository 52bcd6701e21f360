"""The Inception-style score of class probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessella.evaluation.bootstrap import resamples


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


def resampled_score(logits: Tensor, num_splits: int, num_resamples: int, rng: torch.Generator) -> Tensor:
    """Scores ``[num_resamples]``, each split resampled within itself."""
    total = torch.zeros(num_resamples, dtype=torch.float64)
    for split in _splits(logits, num_splits) if num_resamples else ():
        p, negative_entropy = _entropy_terms(split)
        weights = torch.stack(list(resamples(len(split), num_resamples, rng))).double() / len(split)
        total += (weights @ negative_entropy + torch.special.entr(weights @ p).sum(1)).exp()
    return total / num_splits
