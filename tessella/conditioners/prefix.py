"""Vectors from elsewhere: the outputs of a text encoder, features of another network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.conditioners.base import Conditioner


class Prefix(Conditioner):
    """Given vectors through one linear layer.

    Args:
        num_vectors: M.
        in_dim: width of the given vectors.
        dim, dropout: see :class:`Conditioner`. The null is one learned vector at every place.
    """

    batch_key = "context"

    def __init__(self, num_vectors: int, in_dim: int, dim: int, *, dropout: float = 0.1) -> None:
        super().__init__(dim, dropout=dropout)
        if num_vectors < 1:
            raise ValueError(f"num_vectors must be at least 1, got {num_vectors}")
        self.shape = (num_vectors, in_dim)
        self.projection = nn.Linear(in_dim, dim)
        self.nothing = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.nothing, std=0.02)

    @property
    def length(self) -> int:
        """See :attr:`Conditioner.length`."""
        return self.shape[0]

    def null(self, batch_size: int) -> Tensor:
        """See :meth:`Conditioner.null`."""
        return self.nothing.expand(batch_size, self.length, -1)

    def embed(self, condition: Tensor) -> Tensor:
        """See :meth:`Conditioner.embed`; ``condition [B, M, in_dim]``."""
        if tuple(condition.shape[1:]) != self.shape:
            raise ValueError(f"vectors must be [B, {self.shape[0]}, {self.shape[1]}], got {list(condition.shape)}")
        projected: Tensor = self.projection(condition)
        return projected
