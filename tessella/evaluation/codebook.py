"""Exact codebook statistics over a whole data set."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class CodeCounter:
    """Counts how often each code occurs, batch after batch.

    Only codes that occur are stored, so memory depends on the data and not on the codebook size. A perplexity averaged
    over batches would be biased: one batch cannot hold more codes than it has tokens. This one is of the whole set.

    Args:
        codebook_size: V; indices lie in [0, V).
        num_codebooks: K; each codebook is counted on its own and the statistics are averaged.

    Attributes:
        num_positions: latent positions counted so far; each holds K indices.
    """

    def __init__(self, codebook_size: int, num_codebooks: int = 1) -> None:
        if codebook_size < 1 or num_codebooks < 1:
            raise ValueError(f"sizes must be at least 1: codebook_size {codebook_size}, num_codebooks {num_codebooks}")
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.num_positions = 0
        empty = torch.empty(0, dtype=torch.int64)
        self._histograms = [(empty, empty)] * num_codebooks

    def update(self, indices: Tensor) -> None:
        """Count ``indices [..., K]``.

        Raises:
            TypeError: not integers.
            ValueError: the last axis is not K, or an index is outside [0, V).
        """
        if indices.dtype.is_floating_point or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if indices.ndim == 0 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"the last axis of indices must be num_codebooks = {self.num_codebooks}, got {list(indices.shape)}"
            )
        rows = indices.reshape(-1, self.num_codebooks).cpu().long()
        if rows.numel() and not (rows.min() >= 0 and rows.max() < self.codebook_size):
            raise ValueError(f"indices must lie in [0, {self.codebook_size}), got {rows.min()} to {rows.max()}")
        self._histograms = [_add(old, column) for old, column in zip(self._histograms, rows.unbind(1), strict=True)]
        self.num_positions += len(rows)

    def histogram(self, codebook: int = 0) -> tuple[Tensor, Tensor]:
        """Codes that occur ``[U]``, ascending, and their counts ``[U]``; both int64."""
        return self._histograms[codebook]

    @property
    def usage(self) -> float:
        """The fraction of the V codes that occur at least once, averaged over the codebooks."""
        return sum(len(codes) for codes, _ in self._histograms) / (self.num_codebooks * self.codebook_size)

    @property
    def perplexity(self) -> float:
        """``exp(-sum_k f_k ln f_k)`` of the frequencies f, averaged over the codebooks; from 1 to V.

        Raises:
            ValueError: nothing has been counted.
        """
        if not self.num_positions:
            raise ValueError("the perplexity of no indices is not defined; call update first")
        return sum(_perplexity(counts) for _, counts in self._histograms) / self.num_codebooks


def _add(histogram: tuple[Tensor, Tensor], column: Tensor) -> tuple[Tensor, Tensor]:
    old_codes, old_counts = histogram
    new_codes, new_counts = column.unique(return_counts=True)
    codes, position = torch.cat([old_codes, new_codes]).unique(return_inverse=True)
    counts = torch.zeros_like(codes).index_add_(0, position, torch.cat([old_counts, new_counts]))
    return codes, counts


def _perplexity(counts: Tensor) -> float:
    f = counts.double() / counts.sum()
    return math.exp(torch.special.entr(f).sum().item())
