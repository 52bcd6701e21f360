"""What waveforms are reconstructed for: mel spectra, samples and adversaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.errors import ConfigError
from tessella.losses.audio_adversary import AudioAdversary, Balancer
from tessella.losses.mel import MelDistance, MultiScaleSpectral
from tessella.objectives.base import Objective, StepOutput
from tessella.quantizers.base import check_weights
from tessella.tokenizer import Reconstruction


class Audio(Objective):
    r"""Spectral, sample and adversarial errors of waveforms ``[B, C, T]`` in [-1, 1].

    .. math:: L_G = w_m L_{mel} + w_s L_{spectral} + w_1 mean|x - \hat x| + L_{adv} + L_{features}

    The defaults are SimVQ's, 45 times the distance of log-mel spectrograms, without its discriminators.

    Args:
        sample_rate: in Hz.
        mel_weight: w_m, of :class:`~tessella.losses.mel.MelDistance`.
        spectral_weight: w_s, of :class:`~tessella.losses.mel.MultiScaleSpectral`.
        l1_weight: w_1.
        adversary: the discriminators and their weights; None for none.
        balance: let every term pull at the waveform as its weight says, whatever its size, see
            :class:`~tessella.losses.audio_adversary.Balancer`; the loss that is logged then means nothing.

    Raises:
        ValueError: negative weights, or no term beside the adversary's.
    """

    headline: ClassVar[Mapping[str, str]] = {"mel": ""}

    def __init__(
        self,
        *,
        sample_rate: int = 24_000,
        mel_weight: float = 45.0,
        spectral_weight: float = 0.0,
        l1_weight: float = 0.0,
        adversary: AudioAdversary | None = None,
        balance: bool = False,
    ) -> None:
        super().__init__()
        check_weights(mel_weight=mel_weight, spectral_weight=spectral_weight, l1_weight=l1_weight)
        if mel_weight + spectral_weight + l1_weight == 0:
            raise ValueError("mel_weight, spectral_weight and l1_weight must not all be 0")
        self.weights = {"mel": mel_weight, "spectral": spectral_weight, "l1": l1_weight}
        self.mel = MelDistance(sample_rate)
        self.spectral = MultiScaleSpectral(sample_rate) if spectral_weight else None
        self.adversary = adversary
        self.balancer = None
        if balance:
            used = {name: weight for name, weight in self.weights.items() if weight}
            if adversary is not None:
                used |= {"adversary": adversary.weight, "features": adversary.feature_weight}
            self.balancer = Balancer(used)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The adversary's, if there is one."""
        return {} if self.adversary is None else {"discriminator": list(self.adversary.parameters())}

    def check_steps(self, steps: int) -> None:
        """An adversary that would start after the end is refused."""
        if self.adversary is not None and self.adversary.start_step >= steps:
            raise ConfigError(
                f"loss.adversary.start_step ({self.adversary.start_step}) is not before the end of the training "
                f"(training.steps = {steps}): the discriminators would never start"
            )

    def forward(self, batch: Batch, out: Reconstruction, last_layer: nn.Parameter) -> StepOutput:
        """See the class."""
        x, x_hat = batch["x"], out.x_hat.float()[..., : batch["x"].shape[-1]]
        with torch.autocast(x.device.type, enabled=False):
            errors = self._errors(x, x_hat)
        terms = {name: self.weights[name] * error for name, error in errors.items() if self.weights[name]}
        metrics = {name: error.detach() for name, error in errors.items()}
        losses = {}
        if self.adversary is not None:
            judged, losses["discriminator"], about = self.adversary(x, x_hat)
            terms |= judged
            metrics |= about
        if self.balancer is None:
            losses["tokenizer"] = torch.stack(list(terms.values())).sum()
        else:
            losses["tokenizer"] = self.balancer(terms, x_hat)
        return StepOutput(losses, metrics, terms if len(terms) > 1 else {}, x_hat)

    def _errors(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        """Before weighting, by name."""
        errors = {"mel": self.mel(x, x_hat), "l1": (x - x_hat).abs().mean()}
        if self.spectral is not None:
            errors["spectral"] = self.spectral(x, x_hat)
        return errors
