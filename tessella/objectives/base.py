"""What the training step of a tokenizer asks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from tessella.config import Configurable
from tessella.data.base import Batch
from tessella.tokenizer import Reconstruction


@dataclass
class StepOutput:
    """What one forward pass gives.

    Attributes:
        losses: by the optimizer that minimises each. They are summed for one backward pass, so each must be a function
            of its own optimizer's parameters alone: what it takes from another network it takes detached.
        metrics: detached scalars for the log.
        terms: weighted parts of a loss, whose gradients at ``meeting_point`` are logged: which of them pulls how hard.
        meeting_point: the tensor that all ``terms`` are functions of; None where nothing is to be compared.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    meeting_point: Tensor | None = None


class Objective(Configurable, nn.Module, ABC):
    """Losses of a reconstruction: errors, perceptual metrics, and any number of discriminators that learn beside it.

    Its children either train too (a discriminator) or are frozen as a whole (a perceptual metric).

    Attributes:
        headline: logged metrics worth a place on the terminal, with their units.
    """

    headline: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def forward(self, batch: Batch, out: Reconstruction, last_layer: nn.Parameter) -> StepOutput:
        """The losses of ``out = tokenizer(batch["x"], batch.get("context"))``, without the quantizer's own.

        Args:
            batch: what was reconstructed; ``extent`` where its signals were padded.
            out: the reconstruction, with its graph.
            last_layer: the decoder's last weight, where adaptive weights measure gradients.

        Returns:
            ``losses["tokenizer"]``, and one for each of :meth:`parameter_groups`.
        """

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of its own that train, by optimizer."""
        return {}

    def check_steps(self, steps: int) -> None:
        """Refuse a schedule that does not fit into a training of ``steps`` steps.

        Raises:
            ConfigError: it names the setting.
        """
