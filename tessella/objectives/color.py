"""What colours are learned by: the squared error of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from tessella.data.base import Batch
from tessella.evaluation.image import psnr
from tessella.objectives.base import Objective, StepOutput
from tessella.tokenizer import Reconstruction


class Color(Objective):
    r"""Mean squared error of RGB in [-1, 1] (UViM, arXiv 2205.10337), and nothing else."""

    headline: ClassVar[Mapping[str, str]] = {"psnr_db": "dB"}

    def forward(self, batch: Batch, out: Reconstruction, last_layer: nn.Parameter) -> StepOutput:
        """See the class; ``x`` and ``x_hat`` are ``[B, 3, H, W]``."""
        loss = (out.x_hat.float() - batch["x"]).square().mean()
        # psnr is of pictures in [0, 1]; these span 2.
        return StepOutput({"tokenizer": loss}, {"l2": loss.detach(), "psnr_db": psnr(loss.detach() / 4)})
