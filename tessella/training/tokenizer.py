"""The training step of a tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.tokenizer import Tokenizer
from tessella.training.base import Step, StepOutput


class TokenizerStep(Step):
    """Reconstruction error plus the quantizer's own loss.

    .. math:: L = w_1 mean|x - \\hat x| + w_2 mean(x - \\hat x)^2 + L_{quantizer}

    Args:
        tokenizer: what is trained.
        l1_weight: w_1.
        l2_weight: w_2.
    """

    def __init__(self, tokenizer: Tokenizer, *, l1_weight: float = 0.0, l2_weight: float = 1.0) -> None:
        super().__init__()
        if l1_weight < 0 or l2_weight < 0 or l1_weight + l2_weight == 0:
            raise ValueError(f"l1_weight and l2_weight must be >= 0 and not both 0, got {l1_weight} and {l2_weight}")
        self.model = tokenizer
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer trains all."""
        return {"tokenizer": [p for p in self.model.parameters() if p.requires_grad]}

    def forward(self, batch: Batch) -> StepOutput:
        """See the class."""
        x = batch["x"]
        out = self.model(x)
        error = out.x_hat.float() - x
        l1, l2 = error.abs().mean(), error.square().mean()
        loss = self.l1_weight * l1 + self.l2_weight * l2 + out.quantized.loss
        # The signal spans 2, so its peak squared is 4.
        psnr = 10 * (4 / l2.detach().clamp(min=1e-12)).log10()
        metrics = {"l1": l1.detach(), "l2": l2.detach(), "psnr_db": psnr, **out.quantized.metrics}
        return StepOutput({"tokenizer": loss}, metrics)

    @torch.no_grad()
    def pictures(self, model: nn.Module, batch: Batch) -> Tensor:
        """Originals and, below each row of them, reconstructions."""
        x = batch["x"][:8]
        return torch.cat([x, model(x).x_hat.float().clamp(-1, 1)])
