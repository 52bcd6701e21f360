"""Spectra in, spectra out, all layers at the rate of the tokens: Vocos' decoder and its mirror image as the encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.autoencoders._spectra import Backbone, SpectralDecoder, initialise
from tessella.autoencoders.seanet import check_sizes, check_wave
from tessella.ops.spectral import same_stft

_FLOOR = 1e-5
_POWER = 0.3


class Spectral(SpectralDecoder):
    """Waveforms ``[B, 1, T]`` to latents ``[B, ceil(T / hop), E]`` and back to ``[B, 1, hop tokens]``.

    The encoder sees, a spectrum a token, logarithm of magnitude, and real and imaginary part with the magnitude
    compressed to its 0.3rd power; ConvNeXt blocks at the rate of the tokens, on both sides of the latents; and at the
    end Vocos' inverse transform (arXiv 2306.00814; spectra at both ends as in APCodec, arXiv 2402.10533). No layer runs
    at the rate of the samples, which makes a step of training several times cheaper than one of
    :class:`~tessella.autoencoders.seanet.SEANet` of the same size.

    A latent depends on the samples within :attr:`reach` positions, and a sample on the latents within so many: a stream
    with that much context gives what the whole gives.

    Args:
        latent_dim: E.
        hop: samples a token.
        n_fft: samples of a spectrum; at least the hop, and even like the hop.
        dim: width of the blocks.
        hidden: their inner width.
        num_encoder_blocks: before the latents.
        num_decoder_blocks: after them.

    Raises:
        ValueError: a number below 1, or ``n_fft`` that does not fit the hop.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 128,
        hop: int = 160,
        n_fft: int = 640,
        dim: int = 192,
        hidden: int = 576,
        num_encoder_blocks: int = 4,
        num_decoder_blocks: int = 5,
    ) -> None:
        super().__init__()
        check_sizes(latent_dim=latent_dim, hop=hop, dim=dim, hidden=hidden, num_encoder_blocks=num_encoder_blocks,
                    num_decoder_blocks=num_decoder_blocks)  # fmt: skip
        self._set_sizes(latent_dim, hop, n_fft)
        self.reach = 3 * (1 + max(num_encoder_blocks, num_decoder_blocks)) + -(-(n_fft - hop) // (2 * hop))
        self.read = nn.Linear(3 * (n_fft // 2 + 1), dim)
        self.encoder = Backbone(dim, dim, hidden, num_encoder_blocks, dropout=None)
        self.to_latent = nn.Linear(dim, latent_dim)
        self.backbone = Backbone(latent_dim, dim, hidden, num_decoder_blocks, dropout=None)
        self._add_head(dim)
        initialise(self.read)
        initialise(self.head)

    def encode(self, x: Tensor) -> Tensor:
        """``[B, 1, T]`` to ``[B, ceil(T / hop), E]``.

        Raises:
            ValueError: another shape, or no sample.
        """
        check_wave(x, 1)
        whole_hops = functional.pad(x[:, 0], (0, -x.shape[-1] % self.stride))
        spectra = same_stft(whole_hops, self.n_fft, self.stride, self.window).mT
        magnitude = spectra.abs().clamp(min=_FLOOR)
        compressed = spectra * magnitude ** (_POWER - 1)
        features = torch.cat([_POWER * magnitude.log(), compressed.real, compressed.imag], -1)
        latent: Tensor = self.to_latent(self.encoder(self.read(features)))
        return latent
