"""Spectra of waveforms and back; mel filters beside librosa's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tessella.ops.spectral import mel_filters, same_istft, same_stft, stft


@pytest.mark.parametrize(("n_fft", "hop"), [(1280, 320), (640, 160), (2400, 600), (64, 20)])
def test_the_inverse_of_a_transform_is_the_signal(n_fft: int, hop: int) -> None:
    x = torch.randn(2, 7 * hop, dtype=torch.float64)
    window = torch.hann_window(n_fft, dtype=torch.float64)
    spectra = same_stft(x, n_fft, hop, window)
    assert spectra.shape == (2, n_fft // 2 + 1, 7)
    torch.testing.assert_close(same_istft(spectra, n_fft, hop, window), x)


def test_the_inverse_transform_of_one_frame_by_hand() -> None:
    """n_fft 4, hop 2, a rectangle: frames of ones overlap twice and are divided by 2; one sample trimmed a side."""
    spectra = torch.zeros(1, 3, 3, dtype=torch.complex64)
    spectra[:, 0] = 4  # the sum of four ones
    torch.testing.assert_close(same_istft(spectra, 4, 2, torch.ones(4)), torch.ones(1, 6))


def test_a_sine_is_found_at_its_frequency() -> None:
    x = torch.sin(2 * math.pi * 1000 / 16000 * torch.arange(1600))
    magnitude = stft(x, 400, 100, torch.hann_window(400)).abs()
    assert magnitude.shape == (201, 17)
    assert magnitude[:, 8].argmax().item() == 25  # 1000 Hz of 16000 / 400 Hz a bin


def test_short_signals_have_spectra() -> None:
    assert stft(torch.ones(1, 1, 1), 64, 16).shape == (1, 1, 33, 3)


@pytest.mark.parametrize(("rate", "n_fft", "num_mels"), [(24000, 1024, 100), (16000, 512, 80), (44100, 2048, 128)])
def test_mel_filters_equal_librosa(rate: int, n_fft: int, num_mels: int) -> None:
    filters = pytest.importorskip("librosa.filters")
    expected = filters.mel(sr=rate, n_fft=n_fft, n_mels=num_mels, htk=True, norm=None)
    np.testing.assert_allclose(mel_filters(rate, n_fft, num_mels).numpy(), expected, atol=1e-5)
    assert expected.max() > 0.9
