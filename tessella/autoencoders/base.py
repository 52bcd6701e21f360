"""The autoencoder protocol: signals are channels-first, latents channels-last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from tessella.config import Configurable

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}

# What each layer keeps from one chunk of a stream to the next; filled by the first chunk.
Memory = dict[nn.Module, tuple[Tensor, ...]]


class Autoencoder(Configurable, nn.Module, ABC):
    """Encoder and decoder around a bottleneck that is somebody else's business.

    Attributes:
        in_channels: C of the signal.
        latent_dim: E, the features of a latent vector.
        stride: signal samples a latent position stands for, along each axis.
        takes_context: whether :meth:`encode` and :meth:`decode` take a second argument, what both see beside the
            signal.
        chunks_encoder, chunks_decoder: whether :meth:`encode_chunk` and :meth:`decode_chunk` go on, exactly, from what
            earlier chunks left in a memory.
        first_chunk: latent positions that the first chunk must have for that.
        reach: how many latent positions away a sample may be and still matter to a latent, or a latent to a sample;
            None where that has no limit, or nobody said.
    """

    chunks_encoder: bool = False
    chunks_decoder: bool = False
    first_chunk: int = 1
    reach: int | None = None
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

    def encode_chunk(self, x: Tensor, memory: Memory) -> Tensor:
        """:meth:`encode` of what follows the chunks of ``x [B, C, T]`` that ``memory`` has seen.

        All chunks but the last have whole multiples of the stride.

        Raises:
            ValueError: this encoder needs what follows.
        """
        raise ValueError(f"the encoder of {type(self).__name__} needs all of a signal at once")

    def decode_chunk(self, latent: Tensor, memory: Memory) -> Tensor:
        """:meth:`decode` of what follows the chunks of latents ``[B, t, E]`` that ``memory`` has seen.

        Raises:
            ValueError: this decoder needs what follows.
        """
        raise ValueError(f"the decoder of {type(self).__name__} needs all of a signal at once")

    def code_dropout(self, z_q: Tensor) -> Tensor:
        """What the decoder is shown of codes ``[B, *S, D]`` in training: all of them, unless overridden."""
        return z_q

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where adaptive adversarial weighting measures gradients."""

    @property
    def num_axes(self) -> int:
        """The number of axes X of a signal: those of the first convolution, unless overridden."""
        axes = next((_CONVOLUTIONS[type(part)] for part in self.modules() if type(part) in _CONVOLUTIONS), None)
        if axes is None:
            raise NotImplementedError(f"{type(self).__name__} has no convolution; it must define num_axes")
        return axes

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """The latent grid S of a signal of ``extent`` samples along each axis."""
        return tuple(size // self.stride for size in extent)
