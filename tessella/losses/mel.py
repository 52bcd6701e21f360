"""Distances of waveforms on mel spectra."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.ops.spectral import mel_filters, stft

_FLOOR = 1e-7


class MelSpectrogram(nn.Module):
    """Magnitudes through mel filters, ``[..., num_mels, frames]`` of waveforms ``[..., T]``; Hann window, centred.

    Args:
        sample_rate: in Hz.
        n_fft: samples of a frame.
        hop: samples from one to the next.
        num_mels: filters, see :func:`tessella.ops.spectral.mel_filters`.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, n_fft: int = 1024, hop: int = 256, num_mels: int = 100) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.hop = hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("filters", mel_filters(sample_rate, n_fft, num_mels).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        magnitude = stft(x, self.n_fft, self.hop, self.window).abs()
        return self.filters.to(magnitude.dtype) @ magnitude


class MelDistance(nn.Module):
    """``mean |log max(M(x), 1e-7) - log max(M(x_hat), 1e-7)|`` of mel spectrograms M of 100 mels (Vocos, SimVQ)."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.spectrogram = MelSpectrogram(sample_rate)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The distance ``[]`` of waveforms ``[..., T]``."""
        return (log_mel(self.spectrogram, x) - log_mel(self.spectrogram, x_hat)).abs().mean()


class MultiScaleSpectral(nn.Module):
    """EnCodec's spectral loss (arXiv 2210.13438): the mean over windows of 2^6 .. 2^10 samples, hop a quarter, of

    .. math:: mean|M(x) - M(\\hat x)| + mean(log M(x) - log M(\\hat x))^2

    with mel spectrograms M of 64 mels.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        sizes = [2**power for power in range(6, 11)]
        self.scales = nn.ModuleList(MelSpectrogram(sample_rate, size, size // 4, 64) for size in sizes)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The distance ``[]`` of waveforms ``[..., T]``."""
        return torch.stack([self._at(scale, x, x_hat) for scale in self.scales]).mean()

    def _at(self, scale: nn.Module, x: Tensor, x_hat: Tensor) -> Tensor:
        mel, mel_hat = scale(x), scale(x_hat)
        logs = mel.clamp(min=_FLOOR).log() - mel_hat.clamp(min=_FLOOR).log()
        distance: Tensor = (mel - mel_hat).abs().mean() + logs.square().mean()
        return distance


def log_mel(spectrogram: nn.Module, x: Tensor) -> Tensor:
    """Natural logarithm of the mel spectrogram, at least that of 1e-7."""
    logs: Tensor = spectrogram(x).clamp(min=_FLOOR).log()
    return logs
