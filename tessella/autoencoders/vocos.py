"""SEANet's encoder with Vocos' decoder, which writes spectra (WavTokenizer, arXiv 2408.16532; SimVQ's audio half)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tessella.autoencoders._spectra import Backbone, SpectralDecoder, initialise
from tessella.autoencoders.base import Memory
from tessella.autoencoders.seanet import (
    Layers,
    PadMode,
    SEANetEncoder,
    Shortcut,
    check_sizes,
    check_strides,
    check_wave,
)


class Vocos(SpectralDecoder):
    """Waveforms ``[B, 1, T]`` to latents ``[B, ceil(T / stride), E]`` and back to ``[B, 1, stride tokens]``.

    The decoder keeps the rate of the tokens: a convolution, residual blocks around an attention over all positions,
    ConvNeXt blocks, and a linear layer to logarithm of magnitude and phase of one spectrum a token, which the inverse
    transform turns into samples (Vocos, arXiv 2306.00814). The defaults are SimVQ's, 8.80 M and 61.90 M parameters
    without the last layer. The encoder may be causal, the decoder is not.

    Args:
        channels, latent_dim, strides, num_res_layers, kernel, res_kernel, num_lstm_layers, shortcut, causal, pad_mode:
            of the encoder, see :class:`~tessella.autoencoders.seanet.SEANet`.
        dim: width of the decoder.
        hidden: inner width of its ConvNeXt blocks.
        num_blocks: of them.
        n_fft: samples of a spectrum; at least the stride, and even like the stride.
        dropout: in the residual blocks.

    Raises:
        ValueError: a number below 1, no strides, a dropout outside [0, 1), or ``n_fft`` that does not fit the stride.
    """

    def __init__(
        self,
        *,
        channels: int = 32,
        latent_dim: int = 512,
        strides: Sequence[int] = (2, 4, 5, 8),
        num_res_layers: int = 1,
        kernel: int = 7,
        res_kernel: int = 3,
        num_lstm_layers: int = 2,
        shortcut: Shortcut = "conv",
        causal: bool = True,
        pad_mode: PadMode = "reflect",
        dim: int = 768,
        hidden: int = 2304,
        num_blocks: int = 12,
        n_fft: int = 1280,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_strides(strides)
        check_sizes(channels=channels, latent_dim=latent_dim, kernel=kernel, res_kernel=res_kernel,
                    num_res_layers=num_res_layers, dim=dim, hidden=hidden, num_blocks=num_blocks)  # fmt: skip
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self._set_sizes(latent_dim, math.prod(strides), n_fft)
        self.chunks_encoder = causal
        self.first_chunk = kernel
        layers = Layers(num_res_layers, kernel, res_kernel, num_lstm_layers, shortcut, causal, pad_mode)
        self.encoder = SEANetEncoder(1, channels, latent_dim, strides, layers)
        self.backbone = Backbone(latent_dim, dim, hidden, num_blocks, dropout)
        self._add_head(dim)
        initialise(self.head)

    def encode(self, x: Tensor) -> Tensor:
        """``[B, 1, T]`` to ``[B, ceil(T / stride), E]``.

        Raises:
            ValueError: another shape, or no sample.
        """
        check_wave(x, 1)
        latent: Tensor = self.encoder(x).mT
        return latent

    def encode_chunk(self, x: Tensor, memory: Memory) -> Tensor:
        """See :meth:`Autoencoder.encode_chunk`."""
        if not self.chunks_encoder:
            return super().encode_chunk(x, memory)
        check_wave(x, 1)
        latent: Tensor = self.encoder(x, memory).mT
        return latent
