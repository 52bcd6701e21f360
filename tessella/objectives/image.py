"""What pictures are reconstructed for: pixels, a perceptual metric and an adversary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from tessella.data.base import Batch
from tessella.errors import ConfigError
from tessella.evaluation.image import psnr
from tessella.losses.adversarial import Adversary
from tessella.losses.perceptual import LPIPS, Network
from tessella.objectives.base import Objective, StepOutput
from tessella.tokenizer import Reconstruction


class Image(Objective):
    """Reconstruction, perceptual and adversarial error of pictures ``[B, C, H, W]`` in [-1, 1].

    .. math:: L_G = w_1 mean|x - \\hat x| + w_2 mean(x - \\hat x)^2 + w_p LPIPS(x, \\hat x) + w_a L_{adv}(\\hat x)

    Both turns of the adversarial game are taken from one forward pass and at the same weights: the discriminator judges
    the reconstructions that the tokenizer is corrected for. The discriminator therefore sees what it would see if it
    stepped last (SimVQ); a discriminator that steps first (IBQ) corrects the tokenizer with weights one step newer.

    Args:
        l1_weight: w_1.
        l2_weight: w_2.
        perceptual_weight: w_p.
        perceptual_network: of LPIPS.
        weights: folder with the weights of LPIPS, see :meth:`LPIPS.from_folder`; needed if ``perceptual_weight`` > 0.
        adversary: the discriminator, its losses and w_a; None for none.

    Raises:
        ValueError: negative weights, no reconstruction term at all, or a perceptual weight without ``weights``.
        CheckpointError: weights that cannot be used.
    """

    headline: ClassVar[Mapping[str, str]] = {"psnr_db": "dB"}

    def __init__(
        self,
        *,
        l1_weight: float = 0.0,
        l2_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual_network: Network = "vgg16",
        weights: str | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        if min(l1_weight, l2_weight, perceptual_weight) < 0 or l1_weight + l2_weight == 0:
            raise ValueError(
                "l1_weight, l2_weight and perceptual_weight must be >= 0 and the first two not both 0, "
                f"got {l1_weight}, {l2_weight} and {perceptual_weight}"
            )
        if perceptual_weight > 0 and weights is None:
            raise ValueError(
                f"perceptual_weight {perceptual_weight} needs the weights of LPIPS: give their folder with --weights "
                "(loss.weights), or set loss.perceptual_weight=0"
            )
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.perceptual_weight = perceptual_weight
        self.lpips = LPIPS.from_folder(perceptual_network, weights) if weights and perceptual_weight > 0 else None
        self.adversary = adversary

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The adversary's, if there is one."""
        return {} if self.adversary is None else {"discriminator": list(self.adversary.parameters())}

    def check_steps(self, steps: int) -> None:
        """An adversary that would start after the end is refused."""
        if self.adversary is not None and self.adversary.start_step >= steps:
            raise ConfigError(
                f"loss.adversary.start_step ({self.adversary.start_step}) is not before the end of the training "
                f"(training.steps = {steps}): the discriminator would never start"
            )

    def forward(self, batch: Batch, out: Reconstruction, last_layer: nn.Parameter) -> StepOutput:
        """See the class."""
        x, x_hat = batch["x"], out.x_hat.float()
        l1, l2 = (x_hat - x).abs().mean(), (x_hat - x).square().mean()
        terms = {"pixels": self.l1_weight * l1 + self.l2_weight * l2}
        # psnr is of pictures in [0, 1]; these span 2.
        metrics = {"l1": l1.detach(), "l2": l2.detach(), "psnr_db": psnr(l2.detach() / 4)}
        if self.lpips is not None:
            lpips = self.lpips(x, x_hat).mean()
            terms["lpips"] = self.perceptual_weight * lpips
            metrics["lpips"] = lpips.detach()
        losses = {}
        if self.adversary is not None:
            reconstruction = torch.stack(list(terms.values())).sum()
            terms["adversary"], about_term = self.adversary.generator_term(x_hat, reconstruction, last_layer)
            losses["discriminator"], about_loss = self.adversary.discriminator_loss(x, x_hat.detach())
            metrics |= about_term | about_loss
        losses["tokenizer"] = torch.stack(list(terms.values())).sum()
        return StepOutput(losses, metrics, terms if len(terms) > 1 else {}, x_hat)
