"""A pitch tracker by autocorrelation, for deciding which frames of speech are voiced."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_HZ, _HIGH_HZ = 50.0, 550.0
_FRAME_SEC, _HOP_SEC = 0.04, 0.01
_LEAST_PERIODICITY = 0.5
_SILENCE_DB = -60.0


def track_pitch(x: Tensor, sample_rate: int) -> Tensor:
    """The fundamental frequency in Hz of each frame of ``x [T]``, ``[frames]`` every 10 ms; 0 where it is unvoiced.

    A frame of 40 ms is held against itself a lag later by the normalised cross-correlation

    .. math:: c(l) = \\frac{\\sum_n x_n x_{n+l}}{\\sqrt{\\sum_n x_n^2 \\sum_n x_{n+l}^2}}

    (Talkin's RAPT, 1995, without its dynamic programming). It is voiced where its level is above -60 dB of full scale
    and the highest peak of c between the lags of 550 and 50 Hz is at least 0.5; the pitch is that of the shortest lag
    with a peak within 0.05 of it.
    """
    size, hop = round(_FRAME_SEC * sample_rate), round(_HOP_SEC * sample_rate)
    shortest, longest = round(sample_rate / _HIGH_HZ), round(sample_rate / _LOW_HZ)
    padded = torch.nn.functional.pad(x.double(), (0, max(size + longest - len(x), 0)))
    frames = padded.unfold(0, size + longest, hop)  # [F, size + longest]
    n = 2 ** (2 * size + longest - 1).bit_length()
    spectrum = torch.fft.rfft(frames, n)
    products = torch.fft.irfft(torch.fft.rfft(frames[:, :size], n).conj() * spectrum, n)[:, : longest + 1]
    energies = torch.nn.functional.pad(frames.square().cumsum(1), (1, 0))
    shifted = energies[:, size : size + longest + 1] - energies[:, : longest + 1]
    correlation = products / (shifted[:, :1] * shifted).clamp(min=1e-20).sqrt()
    candidates = correlation[:, shortest:-1]
    peaks = (candidates >= correlation[:, shortest - 1 : -2]) & (candidates >= correlation[:, shortest + 1 :])
    heights = candidates.masked_fill(~peaks, 0)
    best = heights.amax(1)
    lag = shortest + (heights >= best[:, None] - 0.05).float().argmax(1)
    loud = shifted[:, 0] / size > 10 ** (_SILENCE_DB / 10)
    return torch.where(loud & (best >= _LEAST_PERIODICITY), sample_rate / lag, 0.0)


def voicing_f1(x: Tensor, x_hat: Tensor, sample_rate: int) -> float | None:
    """F1 of ``x_hat``'s voiced frames against those of ``x`` (both ``[T]``); None where neither has one."""
    truth, found = (track_pitch(signal, sample_rate) > 0 for signal in (x, x_hat))
    hits, total = int((truth & found).sum()), int(truth.sum() + found.sum())
    return 2 * hits / total if total else None
