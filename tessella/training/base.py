"""What the loop asks of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from tessella.data.base import Batch


@dataclass
class StepOutput:
    """Losses by the optimizer that minimises each, and detached scalars for the log."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Step(nn.Module, ABC):
    """One forward pass, the losses that come of it, and which parameters each of them trains.

    A step holds everything that training changes; ``model`` is the part that is averaged (EMA), saved and used.
    """

    model: nn.Module

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer; the keys of :attr:`StepOutput.losses`."""

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Losses of one (micro-)batch."""

    @abstractmethod
    def pictures(self, model: nn.Module, batch: Batch) -> Tensor:
        """Pictures ``[n, 3, H, W]`` in [-1, 1] that show what ``model`` makes of ``batch``."""
