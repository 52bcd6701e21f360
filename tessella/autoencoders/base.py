"""The autoencoder protocol: signals are channels-first, latents channels-last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from tessella.config import Configurable


class Autoencoder(Configurable, nn.Module, ABC):
    """Encoder and decoder around a bottleneck that is somebody else's business.

    Attributes:
        in_channels: C of the signal.
        latent_dim: E, the features of a latent vector.
        stride: signal samples a latent position stands for, along each axis.
        takes_context: whether :meth:`encode` and :meth:`decode` take a second argument, what both see beside the
            signal.
    """

    takes_context: ClassVar[bool] = False

    in_channels: int
    latent_dim: int
    stride: int

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """``x [B, C, *X]`` to latents ``[B, *S, E]``."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Latents ``[B, *S, E]`` to ``x_hat [B, C, *X]``."""

    def code_dropout(self, z_q: Tensor) -> Tensor:
        """What the decoder is shown of codes ``[B, *S, D]`` in training: all of them, unless overridden."""
        return z_q

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where adaptive adversarial weighting measures gradients."""

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """The latent grid S of a signal of ``extent`` samples along each axis."""
        return tuple(size // self.stride for size in extent)
