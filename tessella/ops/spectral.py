"""Short-time spectra of waveforms and the way back; mel filters."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional


def stft(x: Tensor, n_fft: int, hop: int, window: Tensor | None = None, *, centre: bool = True) -> Tensor:
    """Complex spectra ``[..., n_fft / 2 + 1, frames]`` of waveforms ``x [..., T]``.

    Args:
        x: samples; fewer than the transform reflects are extended by zeros first.
        n_fft: samples of a frame.
        hop: samples from one frame to the next.
        window: ``[n_fft]``; None for a rectangle.
        centre: frame t is centred at sample t hop, with n_fft / 2 samples reflected at either end; otherwise frame t
            begins there.
    """
    flat = x.reshape(-1, x.shape[-1])
    shortest = n_fft // 2 + 1 if centre else n_fft
    if flat.shape[-1] < shortest:
        flat = functional.pad(flat, (0, shortest - flat.shape[-1]))
    if window is None:
        window = flat.new_ones(n_fft)
    spectra = torch.stft(
        flat, n_fft, hop, window=window.to(flat.dtype), center=centre, pad_mode="reflect", return_complex=True
    )
    shaped: Tensor = spectra.reshape(*x.shape[:-1], *spectra.shape[1:])
    return shaped


def same_stft(x: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """Spectra ``[B, n_fft / 2 + 1, T / hop]`` of ``x [B, T]``: (n_fft - hop) / 2 zeros at either end.

    :func:`same_istft` is its inverse where hop divides T.
    """
    padded = functional.pad(x, ((n_fft - hop) // 2,) * 2)
    frames = padded.unfold(-1, n_fft, hop) * window
    spectra: Tensor = torch.fft.rfft(frames, dim=-1).mT
    return spectra


def same_istft(spectra: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """Waveforms ``[B, frames hop]`` of ``spectra [B, n_fft / 2 + 1, frames]``, one hop a frame.

    Windowed frames are added where they overlap, divided by the sum of squared windows, and (n_fft - hop) / 2 samples
    are cut off at either end (Vocos, arXiv 2306.00814).
    """
    frames = torch.fft.irfft(spectra, n_fft, dim=-2, norm="backward") * window[:, None]
    num_frames, trim = spectra.shape[-1], (n_fft - hop) // 2
    length = (num_frames - 1) * hop + n_fft
    envelope = window.square()[None, :, None].expand(1, -1, num_frames)

    def overlap_add(columns: Tensor) -> Tensor:
        return functional.fold(columns, (1, length), (1, n_fft), stride=(1, hop))[:, 0, 0, trim : length - trim]

    return overlap_add(frames) / overlap_add(envelope)


@lru_cache(maxsize=64)
def mel_filters(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """Triangular filters ``[num_mels, n_fft / 2 + 1]`` (float32) from 0 to half the rate, equally spaced in HTK mels.

    .. math:: mel(f) = 2595 \\log_{10}(1 + f / 700)

    Each has height 1, as librosa's with ``htk=True, norm=None``. The tensor is shared: copy it before writing into it.
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, top, num_mels + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    slopes = corners[:, None] - frequencies
    widths = corners.diff()[:, None]
    rising, falling = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    return torch.minimum(rising, falling).clamp(min=0).float()
