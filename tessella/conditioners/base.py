"""The protocol of conditioners: what generation depends on, as vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from tessella.config import Configurable


class Conditioner(Configurable, nn.Module, ABC):
    """Conditions to vectors ``[B, M, dim]``, with a learned null for classifier-free guidance.

    Args:
        dim: width of the vectors; the generator supplies its own.
        dropout: probability with which training replaces a sample's condition by the null.

    Attributes:
        batch_key: the entry of a training batch that is the condition; None where there is none.
        needs_condition: whether training without a condition is a mistake: every sample would be the null.
    """

    batch_key: ClassVar[str | None] = None
    needs_condition: ClassVar[bool] = True

    def __init__(self, dim: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        self.dim = dim
        self.dropout = dropout

    @property
    @abstractmethod
    def length(self) -> int:
        """M, the number of vectors."""

    @abstractmethod
    def null(self, batch_size: int) -> Tensor:
        """``[B, M, dim]`` for no condition at all."""

    @abstractmethod
    def embed(self, condition: Tensor) -> Tensor:
        """``[B, M, dim]`` of a condition.

        Raises:
            ValueError: a condition out of range, naming what is accepted.
        """

    def forward(self, condition: Tensor | None, batch_size: int) -> Tensor:
        """``[B, M, dim]``; the null where ``condition`` is None (not in training) or, in training, is dropped.

        Raises:
            ValueError: another number of conditions than samples; or none in training, though there should be.
        """
        if condition is None and self.training and self.needs_condition and self.dropout < 1:
            raise ValueError(
                f"the conditioner {type(self).__name__} got no condition to train with, but learns from them: the data "
                f'must give one for each sample, as batch["{self.batch_key}"]; without conditions train with '
                'conditioner = {name = "none"}'
            )
        if condition is None:
            return self.null(batch_size)
        if len(condition) != batch_size:
            raise ValueError(f"{batch_size} samples but {len(condition)} conditions")
        embedded = self.embed(condition)
        if not self.training or self.dropout == 0:
            return embedded
        dropped = torch.rand(batch_size, 1, 1, device=embedded.device) < self.dropout
        return torch.where(dropped, self.null(batch_size), embedded)
