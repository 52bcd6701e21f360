"""No condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.conditioners.base import Conditioner


class Unconditional(Conditioner):
    """One learned vector, which starts the sequence.

    Args:
        dim: see :class:`Conditioner`.
    """

    needs_condition = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dropout=0.0)
        self.start = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.start, std=0.02)

    @property
    def length(self) -> int:
        """See :attr:`Conditioner.length`."""
        return 1

    def null(self, batch_size: int) -> Tensor:
        """See :meth:`Conditioner.null`."""
        return self.start.expand(batch_size, 1, -1)

    def embed(self, condition: Tensor) -> Tensor:
        """See :meth:`Conditioner.embed`; there is nothing to embed."""
        raise ValueError(f"there are no conditions here, got one of shape {list(condition.shape)}; pass None")
