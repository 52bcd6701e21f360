"""What the loop asks of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.objectives.base import StepOutput


class Step(nn.Module, ABC):
    """One forward pass, the losses that come of it, and which parameters each of them trains.

    A step holds everything that training changes; ``model`` is the part that is averaged (EMA), saved and used.

    Attributes:
        unit: what a rate counts, a plural.
        headline: logged metrics worth a place on the terminal, with their units.
    """

    model: nn.Module
    unit: str = "samples"
    headline: Mapping[str, str] = {}

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer; the keys of :attr:`StepOutput.losses`."""

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Losses of one (micro-)batch."""

    def trained(self) -> dict[str, nn.Module]:
        """The modules that training changes: what a checkpoint must hold."""
        return trained_children(self)

    def networks(self) -> list[nn.Module]:
        """The modules that are worth compiling, each as a whole."""
        return list(self.children())

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """Parts of ``model``, inner ones first, whose parameters are divided over the ranks of a run and gathered while
        each is at work; none where every rank keeps the whole model.
        """
        return []

    def units(self, batch: Batch) -> float:
        """How many of :attr:`unit` a batch holds."""
        return len(batch["x"])

    @abstractmethod
    def preview(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Signals ``[n, C, *X]`` that show what ``model`` makes of ``batch``, in rows."""


def trained_children(module: nn.Module) -> dict[str, nn.Module]:
    """Its children that training changes: with parameters that train, or a hook after each step; others are frozen."""
    return {
        name: child
        for name, child in module.named_children()
        if hasattr(child, "after_step") or any(p.requires_grad for p in child.parameters())
    }
