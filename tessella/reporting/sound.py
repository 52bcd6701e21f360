"""Waveforms, spectrograms and strips of tokens as pictures ``[H, W, 3]`` of uint8."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tessella.ops.spectral import mel_filters, stft
from tessella.reporting.pictures import Array, oklab_to_rgb

_WIDTH_PX, _HEIGHT_PX, _WAVE_PX = 480, 120, 60
_N_FFT, _NUM_MELS, _RANGE_DB = 1024, 80, 80.0
_INK, _PAPER = 70, 250


def spectrogram(x: Tensor, sample_rate: int) -> Array:
    """The log-mel spectrogram of ``x [C, T]``, its channels averaged: low tones below, 80 dB from dark to light."""
    mono = x.detach().float().cpu().mean(0)
    hop = max(1, len(mono) // _WIDTH_PX)
    magnitude = stft(mono, _N_FFT, hop, torch.hann_window(_N_FFT)).abs()
    decibels = 20 * (mel_filters(sample_rate, _N_FFT, _NUM_MELS) @ magnitude).clamp(min=1e-7).log10()
    level = ((decibels - decibels.max()) / _RANGE_DB + 1).clamp(0, 1)
    sized = functional.interpolate(level[None, None], (_HEIGHT_PX, _WIDTH_PX), mode="bilinear", antialias=True)[0, 0]
    return _heat(sized.flip(0)).numpy()


def waveform(x: Tensor) -> Array:
    """Lowest and highest sample of ``x [C, T]``, its channels averaged, in each column; full scale is the height."""
    mono = x.detach().float().cpu().mean(0).clamp(-1, 1)
    columns = functional.interpolate(mono[None, None], _WIDTH_PX * max(1, math.ceil(len(mono) / _WIDTH_PX)))[0, 0]
    parts = columns.view(_WIDTH_PX, -1)
    low, high = parts.amin(1), parts.amax(1)
    heights = torch.linspace(1, -1, _WAVE_PX)[:, None]
    half_px = 1 / _WAVE_PX
    inked = (heights >= low - half_px) & (heights <= high + half_px)
    grey = torch.where(inked, _INK, _PAPER).to(torch.uint8)
    return grey[..., None].expand(-1, -1, 3).contiguous().numpy()


def token_strip(picture: Array, height_px: int = 16) -> Array:
    """A picture of a pixel a token, ``[rows, tokens, 3]``, stretched to the width of the spectrograms."""
    columns = np.arange(_WIDTH_PX) * picture.shape[1] // _WIDTH_PX
    return np.repeat(picture[:, columns], height_px, axis=0)


def _heat(level: Tensor) -> Tensor:
    """Colours ``[..., 3]`` of levels in [0, 1]: dark blue over purple and orange to light yellow."""
    hue = 2 * math.pi * (0.78 + 0.5 * level)
    chroma = 0.04 + 0.5 * level * (1 - level)
    return oklab_to_rgb(torch.stack([0.12 + 0.84 * level, chroma * hue.cos(), chroma * hue.sin()], -1))
