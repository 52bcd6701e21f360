"""What the loop asks of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from tessella.data.base import Batch


@dataclass
class StepOutput:
    """What one forward pass gives.

    Attributes:
        losses: by the optimizer that minimises each.
        metrics: detached scalars for the log.
        terms: weighted parts of a loss, whose gradients at ``meeting_point`` are logged: which of them pulls how hard.
        meeting_point: the tensor that all ``terms`` are functions of; None where nothing is to be compared.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    meeting_point: Tensor | None = None


class Step(nn.Module, ABC):
    """One forward pass, the losses that come of it, and which parameters each of them trains.

    A step holds everything that training changes; ``model`` is the part that is averaged (EMA), saved and used. Its
    other children either train too (a discriminator) or are frozen as a whole (a perceptual metric).
    """

    model: nn.Module

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer; the keys of :attr:`StepOutput.losses`."""

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Losses of one (micro-)batch."""

    def trained(self) -> dict[str, nn.Module]:
        """The children that training changes: what a checkpoint must hold."""
        children = self.named_children()
        return {name: child for name, child in children if any(p.requires_grad for p in child.parameters())}

    @abstractmethod
    def pictures(self, model: nn.Module, batch: Batch) -> Tensor:
        """Pictures ``[n, 3, H, W]`` in [-1, 1] that show what ``model`` makes of ``batch``."""
