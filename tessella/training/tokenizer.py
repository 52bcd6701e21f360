"""The training step of a tokenizer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.media.base import Medium
from tessella.objectives.base import Objective, StepOutput
from tessella.tokenizer import Tokenizer
from tessella.training.base import Step, trained_children

_SHOWN = 8


class TokenizerStep(Step):
    """What an objective asks of a reconstruction, plus the quantizer's own loss.

    Args:
        tokenizer: what is trained.
        objective: the losses of its reconstructions, and what else they train.
        medium: what the signals are.
    """

    def __init__(self, tokenizer: Tokenizer, objective: Objective, medium: Medium) -> None:
        super().__init__()
        self.model = tokenizer
        self.objective = objective
        self.medium = medium
        self.unit = medium.unit
        self.headline = objective.headline

    @property
    def tokenizer(self) -> Tokenizer:
        """The model."""
        return cast(Tokenizer, self.model)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer for the tokenizer, and those of the objective."""
        groups = {"tokenizer": [p for p in self.model.parameters() if p.requires_grad]}
        return groups | self.objective.parameter_groups()

    def trained(self) -> dict[str, nn.Module]:
        """The tokenizer, and what learns beside it."""
        return {"model": self.model, **trained_children(self.objective)}

    def networks(self) -> list[nn.Module]:
        """The tokenizer, and the objective's parts one by one: what is between them asks for values."""
        return [self.model, *self.objective.children()]

    def units(self, batch: Batch) -> float:
        """As the medium counts."""
        return self.medium.units(batch["x"])

    def forward(self, batch: Batch) -> StepOutput:
        """See the class."""
        reconstruction = self.model(batch["x"], batch.get("context"))
        out: StepOutput = self.objective(batch, reconstruction, self.tokenizer.autoencoder.last_layer)
        out.losses["tokenizer"] = out.losses["tokenizer"] + reconstruction.quantized.loss
        out.metrics = reconstruction.quantized.metrics | out.metrics
        return out

    @torch.no_grad()
    def preview(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Originals and reconstructions."""
        x, context = batch["x"][:_SHOWN], batch.get("context")
        return [x, model(x, None if context is None else context[:_SHOWN]).x_hat.float()]
