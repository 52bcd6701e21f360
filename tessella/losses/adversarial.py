"""Adversarial losses: one function an equation, and ``Adversary``, which holds the discriminator and their settings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tessella.config import Configurable
from tessella.distributed import all_reduce_sum, world_size
from tessella.losses.discriminators import PatchGAN, StyleGAN
from tessella.quantizers.base import check_choice, check_weights, full_precision

Discriminator = Literal["patchgan", "stylegan"]
DiscriminatorLoss = Literal["hinge", "non_saturating"]
GeneratorLoss = Literal["hinge", "non_saturating", "non_saturating_mean_logit"]
Reduction = Literal["mean_loss", "mean_logit"]


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))) / 2`` of logits of any shape."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def non_saturating_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean -log s(D(x)) + mean -log(1 - s(D(x_hat)))) / 2`` with s the logistic function: cross-entropy."""
    return 0.5 * (functional.softplus(-real).mean() + functional.softplus(fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``-mean D(x_hat)``."""
    return -fake.mean()


def non_saturating_generator_loss(fake: Tensor, reduction: Reduction = "mean_loss") -> Tensor:
    """``mean -log s(D(x_hat))`` of logits ``[B, ...]``; s is the logistic function.

    Args:
        fake: D(x_hat), one logit a picture or one a patch.
        reduction: ``"mean_loss"`` takes the mean over the losses of all patches; ``"mean_logit"`` first averages the
            logits of each picture (IBQ, SimVQ), so that one convincing patch makes up for others.
    """
    check_choice("reduction", reduction, Reduction)
    return functional.softplus(-(fake.flatten(1).mean(1) if reduction == "mean_logit" else fake)).mean()


def r1_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """``mean_b |d D(x_b) / d x_b|^2`` (Mescheder et al., arXiv 1801.04406), differentiable again.

    D(x_b) is the mean of a picture's logits. The paper's loss is gamma / 2 times this.

    Args:
        logits: ``[B, ...]`` of ``x``. Those of one picture should not depend on another: batch normalisation mixes
            their gradients. So does the minibatch deviation of :class:`StyleGAN`, by one of its last layer's many
            channels; there, as in StyleGAN2, the penalty is on the gradient of the sum over the batch.
        x: ``[B, ...]``, requires grad.
    """
    (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), x, create_graph=True)
    return full_precision(gradient).flatten(1).square().sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, max: float = 1e4) -> Tensor:
    """``|d reconstruction / d W| / (|d adversarial / d W| + 1e-4)``, at most ``max``, detached (VQGAN, 2012.09841).

    Scales the adversarial loss so that both pull equally at the decoder's last weight W, over the batch of all ranks.
    The graphs of both losses are kept.
    """

    def size(loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norm: Tensor = (all_reduce_sum(full_precision(gradient)) / world_size()).norm()
        return norm

    weight: Tensor = size(reconstruction) / (size(adversarial) + 1e-4)
    return weight.clamp(max=max).detach()


class LeCAM(nn.Module):
    r"""Keeps logits near where they have been (Tseng et al., arXiv 2104.03310), against overfitting on little data.

    .. math:: R = mean\,\max(0, D(x) - \bar D_{fake})^2 + mean\,\max(0, \bar D_{real} - D(\hat x))^2

    with moving averages of the mean logits over all ranks, initially 0. A forward pass in training mode first advances
    them, so under gradient accumulation once a micro-batch; evaluation changes nothing.

    Args:
        decay: of the averages, in [0, 1).
    """

    ema_real: Tensor
    ema_fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty of logits ``real`` = D(x) and ``fake`` = D(x_hat), each of any shape."""
        if self.training:
            self._update(real, fake)
        over_fake = functional.relu(real - self.ema_fake)
        under_real = functional.relu(self.ema_real - fake)
        return over_fake.square().mean() + under_real.square().mean()

    @torch.no_grad()
    def _update(self, real: Tensor, fake: Tensor) -> None:
        means = all_reduce_sum(torch.stack([real.mean(), fake.mean()])) / world_size()
        self.ema_real.lerp_(means[0].to(self.ema_real), 1 - self.decay)
        self.ema_fake.lerp_(means[1].to(self.ema_fake), 1 - self.decay)


class Adversary(Configurable, nn.Module):
    r"""A discriminator D and the game it plays with a tokenizer.

    .. math::
        L_G = \ldots + w(t)\, \lambda\, g(D(\hat x)), \qquad
        L_D = d(D(x), D(\hat x)) + w_{LeCAM} R + \tfrac{1}{2} w_{R1} |\nabla_x D(x)|^2

    with w(t) of :meth:`weight_now` and lambda = 1, or that of :func:`adaptive_weight`. The discriminator is used in
    training mode for both losses, so the batch normalisation of a PatchGAN sees one kind of picture at a time and its
    running statistics advance with each of the three passes, as in the VQGAN family.

    Under gradient accumulation every micro-batch counts as a batch of its own: in batch normalisation, LeCAM's
    averages, R1 and the adaptive weight. The step count advances once per optimizer step, by :meth:`after_step`.

    ============== ===========================================================================================
    VQGAN          adaptive True, weight 0.8, start_step once reconstructions no longer improve without
    LlamaGen       weight 0.5, start_step 20,000
    IBQ            generator_loss "non_saturating_mean_logit", weight 0.1, lecam_weight 0.05
    SimVQ          generator_loss "non_saturating_mean_logit", weight 0.1
    MaskGIT        discriminator "stylegan", loss and generator_loss "non_saturating", weight 0.1, r1_weight 40
    ============== ===========================================================================================

    Published code differs by constant factors of L_D, which Adam does not see: MaskGIT's adds cost |grad|^2 to the sum
    of both cross-entropies, which is twice the L_D above with ``r1_weight`` = cost. Its cost of 10 is for pictures in
    [0, 1]; in [-1, 1] every derivative is half as large, so |grad|^2 weighs the same at 40.

    Args:
        discriminator: ``"patchgan"`` or ``"stylegan"``.
        discriminator_channels: its width.
        size_px: side of the pictures; for ``"stylegan"`` alone.
        loss: d, of the discriminator.
        generator_loss: g, of the tokenizer; ``"non_saturating_mean_logit"`` averages the logits of a picture first.
        weight: of g, once warmed up.
        adaptive: scale it by :func:`adaptive_weight`.
        start_step: the first optimizer step with an adversary; before it neither network is trained by these losses.
        warmup_steps: steps over which the weight then rises linearly; the discriminator learns at once.
        lecam_weight: of :class:`LeCAM`.
        r1_weight: gamma of :func:`r1_penalty`.
        r1_every: steps from one R1 penalty to the next, each ``r1_every`` times as heavy (StyleGAN2's lazy
            regularization).

    Raises:
        ValueError: an unknown choice, a negative weight or number of steps, ``r1_every`` below 1, ``size_px`` where
            the discriminator has none or the reverse.
    """

    num_steps: Tensor

    def __init__(
        self,
        *,
        discriminator: Discriminator = "patchgan",
        discriminator_channels: int = 64,
        size_px: int | None = None,
        loss: DiscriminatorLoss = "hinge",
        generator_loss: GeneratorLoss = "hinge",
        weight: float = 0.1,
        adaptive: bool = False,
        start_step: int = 0,
        warmup_steps: int = 0,
        lecam_weight: float = 0.0,
        r1_weight: float = 0.0,
        r1_every: int = 1,
    ) -> None:
        super().__init__()
        check_choice("discriminator", discriminator, Discriminator)
        check_choice("loss", loss, DiscriminatorLoss)
        check_choice("generator_loss", generator_loss, GeneratorLoss)
        check_weights(weight=weight, lecam_weight=lecam_weight, r1_weight=r1_weight)
        for name, value, low in (("start_step", start_step, 0), ("warmup_steps", warmup_steps, 0),
                                 ("r1_every", r1_every, 1)):  # fmt: skip
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.discriminator = _build(discriminator, discriminator_channels, size_px)
        self.lecam = LeCAM() if lecam_weight > 0 else None
        self.loss: DiscriminatorLoss = loss
        self.generator_loss: GeneratorLoss = generator_loss
        self.weight = weight
        self.adaptive = adaptive
        self.start_step = start_step
        self.warmup_steps = warmup_steps
        self.lecam_weight = lecam_weight
        self.r1_weight = r1_weight
        self.r1_every = r1_every
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def weight_now(self) -> Tensor:
        """w(t) ``[]``: 0 before ``start_step``, then rising for ``warmup_steps`` steps, then ``weight``."""
        steps_in = self.num_steps - self.start_step + 1
        return self.weight * (steps_in / max(self.warmup_steps, 1)).clamp(0, 1)

    def generator_term(
        self, x_hat: Tensor, reconstruction_loss: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to add to the tokenizer's loss; it gives the discriminator's parameters no gradient.

        Args:
            x_hat: reconstructions ``[B, C, H, W]``, with their graph.
            reconstruction_loss: what ``adaptive`` balances against.
            last_layer: the decoder's last weight, for ``adaptive``.

        Returns:
            The weighted term ``[]``, and ``adversarial`` (g) and ``adversarial_weight`` (its factor).
        """
        if not self._started():
            zero = full_precision(x_hat.detach()).new_zeros(())
            return zero, {"adversarial": zero, "adversarial_weight": zero}
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        fake = full_precision(functional_call(self.discriminator, frozen, (x_hat,)))
        loss = self._generator_loss(fake)
        weight = self.weight_now()
        if self.adaptive:
            weight = weight * adaptive_weight(reconstruction_loss, loss, last_layer)
        return weight * loss, {"adversarial": loss.detach(), "adversarial_weight": weight}

    def discriminator_loss(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_D of pictures ``x`` and their reconstructions ``x_hat``, both ``[B, C, H, W]`` and taken as constants.

        Returns:
            The loss ``[]``, and the means ``logits_real`` and ``logits_fake`` with the penalties ``lecam`` and ``r1``
            before weighting; 0 where they are off, and for R1 on the steps between.
        """
        if not self._started():
            zero = full_precision(x.detach()).new_zeros(())
            # On no parameter's path: gradients stay None, so an optimizer touches neither weights nor moments.
            return zero.clone().requires_grad_(), dict.fromkeys(("logits_real", "logits_fake", "lecam", "r1"), zero)
        real, r1 = self._real_logits(x.detach())
        fake = full_precision(self.discriminator(x_hat.detach()))
        lecam = real.new_zeros(()) if self.lecam is None else self.lecam(real, fake)
        loss = hinge_discriminator_loss if self.loss == "hinge" else non_saturating_discriminator_loss
        total = loss(real, fake) + self.lecam_weight * lecam + 0.5 * self.r1_weight * self.r1_every * r1
        metrics = {"logits_real": real.mean(), "logits_fake": fake.mean(), "lecam": lecam, "r1": r1}
        return total, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Count an optimizer step."""
        self.num_steps.add_(1)

    def _generator_loss(self, fake: Tensor) -> Tensor:
        if self.generator_loss == "hinge":
            return hinge_generator_loss(fake)
        mean_logit = self.generator_loss == "non_saturating_mean_logit"
        return non_saturating_generator_loss(fake, "mean_logit" if mean_logit else "mean_loss")

    def _real_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """D(x), and R1 where it is due."""
        if self.r1_weight > 0 and (self.r1_every == 1 or self._steps_done() % self.r1_every == 0):
            # A compiled graph cannot be differentiated twice.
            penalized: tuple[Tensor, Tensor] = torch.compiler.disable(self._penalized_logits)(x)
            return penalized
        real = full_precision(self.discriminator(x))
        return real, real.new_zeros(())

    def _penalized_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        real = full_precision(self.discriminator(x))
        return real, r1_penalty(real, x)

    def _started(self) -> bool:
        return self.start_step == 0 or self._steps_done() >= self.start_step

    def _steps_done(self) -> int:
        # Asked only where the answer decides something: reading a number waits for all that the device has queued.
        return int(self.num_steps)


def _build(discriminator: Discriminator, channels: int, size_px: int | None) -> nn.Module:
    if discriminator == "patchgan":
        if size_px is not None:
            raise ValueError(f"size_px is for discriminator 'stylegan'; a PatchGAN takes any size, got {size_px}")
        return PatchGAN(channels)
    if size_px is None:
        raise ValueError("discriminator 'stylegan' needs size_px, the side of the pictures")
    return StyleGAN(size_px, channels)
