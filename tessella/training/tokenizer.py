"""The training step of a tokenizer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.evaluation.reconstruction import psnr
from tessella.losses.adversarial import Adversary
from tessella.losses.perceptual import LPIPS, Network
from tessella.tokenizer import Tokenizer
from tessella.training.base import Step, StepOutput


class TokenizerStep(Step):
    """Reconstruction, perceptual and adversarial error plus the quantizer's own loss.

    .. math:: L_G = w_1 mean|x - \\hat x| + w_2 mean(x - \\hat x)^2 + w_p LPIPS(x, \\hat x) + w_a L_{adv}(\\hat x)
              + L_{quantizer}

    Both turns of the adversarial game are taken from one forward pass and at the same weights: the discriminator judges
    the reconstructions that the tokenizer is corrected for. The discriminator therefore sees what it would see if it
    stepped last (SimVQ); a discriminator that steps first (IBQ) corrects the tokenizer with weights one step newer.

    Args:
        tokenizer: what is trained.
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

    def __init__(
        self,
        tokenizer: Tokenizer,
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
        self.model = tokenizer
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.perceptual_weight = perceptual_weight
        self.lpips = LPIPS.from_folder(perceptual_network, weights) if weights and perceptual_weight > 0 else None
        self.adversary = adversary

    @property
    def tokenizer(self) -> Tokenizer:
        """The model."""
        return cast(Tokenizer, self.model)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer for the tokenizer, and one for its adversary."""
        groups = {"tokenizer": [p for p in self.model.parameters() if p.requires_grad]}
        if self.adversary is not None:
            groups["discriminator"] = list(self.adversary.parameters())
        return groups

    def forward(self, batch: Batch) -> StepOutput:
        """See the class."""
        x = batch["x"]
        out = self.model(x)
        x_hat = out.x_hat.float()
        l1, l2 = (x_hat - x).abs().mean(), (x_hat - x).square().mean()
        terms = {"pixels": self.l1_weight * l1 + self.l2_weight * l2}
        # psnr is of pictures in [0, 1]; these span 2.
        metrics = {"l1": l1.detach(), "l2": l2.detach(), "psnr_db": psnr(l2.detach() / 4), **out.quantized.metrics}
        if self.lpips is not None:
            lpips = self.lpips(x, x_hat).mean()
            terms["lpips"] = self.perceptual_weight * lpips
            metrics["lpips"] = lpips.detach()
        losses = {}
        if self.adversary is not None:
            reconstruction = torch.stack(list(terms.values())).sum()
            last_layer = self.tokenizer.autoencoder.last_layer
            terms["adversary"], about_term = self.adversary.generator_term(x_hat, reconstruction, last_layer)
            losses["discriminator"], about_loss = self.adversary.discriminator_loss(x, x_hat.detach())
            metrics |= about_term | about_loss
        losses["tokenizer"] = torch.stack(list(terms.values())).sum() + out.quantized.loss
        return StepOutput(losses, metrics, terms if len(terms) > 1 else {}, x_hat)

    @torch.no_grad()
    def pictures(self, model: nn.Module, batch: Batch) -> Tensor:
        """Originals and, below each row of them, reconstructions."""
        x = batch["x"][:8]
        return torch.cat([x, model(x).x_hat.float().clamp(-1, 1)])
