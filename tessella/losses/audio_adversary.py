"""Adversarial losses of waveforms and feature matching; a balancer of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tessella.config import Configurable
from tessella.distributed import all_reduce_sum, world_size
from tessella.losses.audio_discriminators import (
    Judgement,
    MultiBand,
    MultiPeriod,
    MultiResolution,
    MultiScaleSTFT,
    Rule,
    WaveDiscriminator,
)
from tessella.quantizers.base import check_choice, check_weights

Kind = Literal["period", "resolution", "band", "stft"]


def discriminator_loss(real: Tensor, fake: Tensor, rule: Rule) -> Tensor:
    """``mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))``, or ``mean (1 - D(x))^2 + mean D(x_hat)^2``."""
    if rule == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    return (1 - real).square().mean() + fake.square().mean()


def generator_loss(fake: Tensor, rule: Rule) -> Tensor:
    """``mean max(0, 1 - D(x_hat))``, or ``mean (1 - D(x_hat))^2``."""
    return (1 - fake).clamp(min=0).mean() if rule == "hinge" else (1 - fake).square().mean()


def feature_distance(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """``sum_l mean |f_l(x) - f_l(x_hat)|`` over layers l; the features of x are constants."""
    return torch.stack([(a.detach() - b).abs().mean() for a, b in zip(real, fake, strict=True)]).sum()


class AudioAdversary(Configurable, nn.Module):
    """Discriminators of waveforms, their losses, and the matching of their features.

    Each kind's losses are the mean over its networks, those of ``"band"`` their sum, as SimVQ takes them.

    Args:
        discriminators: of ``"period"``, ``"resolution"``, ``"band"`` (DAC's, with periods of its own) and ``"stft"``
            (EnCodec's).
        width: their channels as a multiple of the published ones.
        weight: of the adversarial loss.
        feature_weight: of feature matching.
        start_step: the first optimizer step with an adversary; before it neither network is trained by these losses.
        warmup_steps: steps over which both weights then rise linearly; the discriminators learn at once.

    Raises:
        ValueError: an unknown or no discriminator, a width that leaves no channel, negative weights or steps.
    """

    num_steps: Tensor

    def __init__(
        self,
        *,
        discriminators: Sequence[Kind] = ("period", "resolution", "band"),
        width: float = 1.0,
        weight: float = 1.0,
        feature_weight: float = 1.0,
        start_step: int = 0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if not discriminators:
            raise ValueError("discriminators must name at least one")
        for kind in discriminators:
            check_choice("discriminator", kind, Kind)
        check_weights(weight=weight, feature_weight=feature_weight)
        if min(start_step, warmup_steps) < 0:
            raise ValueError(f"start_step and warmup_steps must be at least 0, got {start_step} and {warmup_steps}")
        if width <= 0 or 32 * width < 1:
            raise ValueError(f"width must leave at least one channel of 32, got {width}")
        self.discriminators = nn.ModuleDict({kind: _build(kind, width) for kind in discriminators})
        self.weight = weight
        self.feature_weight = feature_weight
        self.start_step = start_step
        self.warmup_steps = warmup_steps
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, x_hat: Tensor) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Both turns of the game at the same weights.

        Args:
            x: originals ``[B, 1, T]``.
            x_hat: reconstructions, with their graph.

        Returns:
            The tokenizer's weighted terms ``adversary`` and ``features`` (which give the discriminators no gradient),
            the discriminators' loss, and metrics.
        """
        if self.start_step and int(self.num_steps) < self.start_step:
            zero = x.new_zeros(())
            # On no parameter's path: gradients stay None, so an optimizer touches neither weights nor moments.
            return {}, zero.clone().requires_grad_(), {"adversarial": zero, "features": zero}
        adversarial, features, losses = [], [], []
        for discriminator in self.discriminators.values():
            assert isinstance(discriminator, WaveDiscriminator)
            rule, scale = discriminator.rule, 1.0
            real: Judgement = discriminator(x.detach())
            fake: Judgement = discriminator(x_hat.detach())
            frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
            seen: Judgement = functional_call(discriminator, frozen, (x_hat,))
            if discriminator.averages:
                scale = 1 / len(real)
            for (truth, real_logits), (_, fake_logits), (felt, logits) in zip(real, fake, seen, strict=True):
                losses.append(scale * discriminator_loss(real_logits, fake_logits, rule))
                adversarial.append(scale * generator_loss(logits, rule))
                features.append(scale * feature_distance(truth, felt))
        pull, matching = torch.stack(adversarial).sum(), torch.stack(features).sum()
        ramp = ((self.num_steps - self.start_step + 1) / max(self.warmup_steps, 1)).clamp(0, 1)
        terms = {"adversary": self.weight * ramp * pull, "features": self.feature_weight * ramp * matching}
        metrics = {"adversarial": pull.detach(), "features": matching.detach()}
        return terms, torch.stack(losses).sum(), metrics

    @torch.no_grad()
    def after_step(self) -> None:
        """Count an optimizer step."""
        self.num_steps.add_(1)


class Balancer(nn.Module):
    r"""EnCodec's balancer (arXiv 2210.13438, equation 4): every loss pulls at x_hat as hard as its weight says.

    .. math:: G = \sum_i \frac{w_i}{\sum_j w_j} \frac{g_i}{\langle |g_i| \rangle}

    with g_i the gradient of loss i at x_hat and the average of its norm over steps, which forgets with ``decay``.

    Args:
        weights: w_i by the names of the losses.
        decay: of the averages.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.decay = decay
        self.register_buffer("sums", torch.zeros(len(weights)))
        self.register_buffer("counts", torch.zeros(len(weights)))
        self._pending: dict[str, list[Tensor]] = {}

    def forward(self, losses: Mapping[str, Tensor], x_hat: Tensor) -> Tensor:
        """A loss ``[]`` whose gradient at ``x_hat [B, C, T]`` is G; its value says nothing.

        Args:
            losses: some or all of those that have weights, as functions of ``x_hat``; their scale has no part.
            x_hat: with its graph.
        """
        pull = torch.zeros_like(x_hat)
        total = sum(self.weights[name] for name in losses)
        for position, (name, weight) in enumerate(self.weights.items()):
            if name not in losses:
                continue
            # As over the batch of all ranks, of which this one's signals are a part.
            gradient = torch.autograd.grad(losses[name], x_hat, retain_graph=True)[0] / world_size()
            norm = all_reduce_sum(gradient.flatten(1).norm(dim=1).mean()) / world_size()
            self._pending.setdefault(name, []).append(norm)
            average = (self.decay * self.sums[position] + norm) / (self.decay * self.counts[position] + 1)
            pull += weight / total * gradient / average.clamp(min=1e-12)
        total_pull: Tensor = (pull.detach() * x_hat).sum()
        return total_pull * world_size()  # gradients are averaged over ranks, and this one is no mean

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the norms of the step's passes into the averages."""
        for position, name in enumerate(self.weights):
            if norms := self._pending.pop(name, None):
                self.sums[position] = self.decay * self.sums[position] + torch.stack(norms).mean()
                self.counts[position] = self.decay * self.counts[position] + 1


def _build(kind: Kind, width: float) -> WaveDiscriminator:
    published = 64 if kind == "resolution" else 32
    cls: Any = {"period": MultiPeriod, "resolution": MultiResolution, "band": MultiBand, "stft": MultiScaleSTFT}[kind]
    discriminator: WaveDiscriminator = cls(round(published * width))
    return discriminator
