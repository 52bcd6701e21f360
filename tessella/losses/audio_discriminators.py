"""Discriminators of waveforms; each gives logits and hidden features of several networks, one a view of the signal."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from tessella.ops.spectral import stft

PERIODS = (2, 3, 5, 7, 11)
_BAND_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)

# Of each view: the features of its layers, and the logits.
Judgement = list[tuple[list[Tensor], Tensor]]
Rule = Literal["hinge", "least_squares"]


class WaveDiscriminator(nn.Module, ABC):
    """Networks that tell waveforms ``[B, 1, T]`` from reconstructions.

    Attributes:
        rule: of its adversarial loss.
        averages: whether losses are the mean over its views, or their sum.
    """

    rule: ClassVar[Rule] = "hinge"
    averages: ClassVar[bool] = True

    @abstractmethod
    def forward(self, x: Tensor) -> Judgement:
        """The judgement of every view."""


class MultiPeriod(WaveDiscriminator):
    """HiFi-GAN's (arXiv 2010.05646): the waveform wrapped to rows of each period, seen by columns.

    Args:
        channels: width after the first layer; then 4, 16, 32 and 32 times that.
        periods: in samples.
        first_feature: the first layer whose features are matched.
    """

    def __init__(self, channels: int = 32, periods: Sequence[int] = PERIODS, *, first_feature: int = 1) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(_Period(period, channels, first_feature) for period in periods)

    def forward(self, x: Tensor) -> Judgement:
        """See :class:`WaveDiscriminator`."""
        return [discriminator(x) for discriminator in self.discriminators]


class MultiResolution(WaveDiscriminator):
    """UnivNet's (arXiv 2106.07889) as in Vocos: magnitudes of STFTs with frames of 1024, 2048 and 512 samples.

    The hop is a quarter of the frame, the window a rectangle.

    Args:
        channels: width of every layer.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(_Magnitude(n_fft, channels) for n_fft in (1024, 2048, 512))

    def forward(self, x: Tensor) -> Judgement:
        """See :class:`WaveDiscriminator`."""
        return [discriminator(x) for discriminator in self.discriminators]


class MultiBand(WaveDiscriminator):
    """DAC's (arXiv 2306.06546): the periods, and complex STFTs in five bands, of a signal without offset at peak 0.8.

    Least squares, summed over its eight networks.

    Args:
        channels: width of the layers on bands, and of the first layer on periods.
    """

    rule: ClassVar[Rule] = "least_squares"
    averages: ClassVar[bool] = False

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([
            *(_Period(period, channels, 0) for period in PERIODS),
            *(_Bands(n_fft, channels) for n_fft in (2048, 1024, 512)),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Judgement:
        """See :class:`WaveDiscriminator`."""
        x = x - x.mean(-1, keepdim=True)
        x = 0.8 * x / (x.abs().amax(-1, keepdim=True) + 1e-9)
        return [discriminator(x) for discriminator in self.discriminators]


class MultiScaleSTFT(WaveDiscriminator):
    """EnCodec's (arXiv 2210.13438): real and imaginary parts of STFTs with frames of 1024, 2048, 512, 256 and 128.

    Args:
        channels: width of every layer.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(_Complex(n_fft, channels) for n_fft in (1024, 2048, 512, 256, 128))

    def forward(self, x: Tensor) -> Judgement:
        """See :class:`WaveDiscriminator`."""
        return [discriminator(x) for discriminator in self.discriminators]


class _Stack(nn.Module):
    """Convolutions with leaky rectifiers between them, of which those from ``first_feature`` on are matched."""

    def __init__(self, convs: Sequence[nn.Module], last: nn.Module, *, first_feature: int, slope: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.conv_post = last
        self.first_feature = first_feature
        self.slope = slope

    def judge(self, h: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features and logits of ``h [B, C, height, width]``."""
        features = []
        for conv in self.convs:
            h = functional.leaky_relu(conv(h), self.slope)
            features.append(h)
        return features[self.first_feature :], self.conv_post(h)


class _Period(_Stack):
    def __init__(self, period: int, channels: int, first_feature: int) -> None:
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels]
        convs = [
            _conv(inner, outer, (5, 1), stride=(3 if layer < 4 else 1, 1))
            for layer, (inner, outer) in enumerate(itertools.pairwise(widths))
        ]
        super().__init__(convs, _conv(widths[-1], 1, (3, 1)), first_feature=first_feature)
        self.period = period

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = functional.pad(x, (0, -x.shape[-1] % self.period), mode="reflect")
        return self.judge(x.unflatten(-1, (-1, self.period)))


class _Magnitude(_Stack):
    def __init__(self, n_fft: int, channels: int) -> None:
        convs = [
            _conv(1, channels, (7, 5), stride=(2, 2)),
            _conv(channels, channels, (5, 3), stride=(2, 1)),
            _conv(channels, channels, (5, 3), stride=(2, 2)),
            _conv(channels, channels, (3, 3), stride=(2, 1)),
            _conv(channels, channels, (3, 3), stride=(2, 2)),
        ]
        super().__init__(convs, _conv(channels, 1, (3, 3)), first_feature=1)
        self.n_fft = n_fft

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        return self.judge(stft(x, self.n_fft, self.n_fft // 4).abs())


class _Bands(nn.Module):
    """A stack for each band of frequencies, whose last features meet in one convolution."""

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        size = n_fft // 2 + 1
        self.bands = [(int(low * size), int(high * size)) for low, high in itertools.pairwise(_BAND_EDGES)]
        self.band_convs = nn.ModuleList(nn.ModuleList(self._layers(channels)) for _ in self.bands)
        self.conv_post = _conv(channels, 1, (3, 3))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        spectra = _real_and_imaginary(stft(x, self.n_fft, self.n_fft // 4))
        features, ends = [], []
        for (low, high), convs in zip(self.bands, self.band_convs, strict=True):
            h = spectra[..., low:high]
            assert isinstance(convs, nn.ModuleList)
            for conv in convs:
                h = functional.leaky_relu(conv(h), 0.1)
                features.append(h)
            ends.append(h)
        return features, self.conv_post(torch.cat(ends, -1))

    def _layers(self, channels: int) -> list[nn.Module]:
        return [
            _conv(2, channels, (3, 9)),
            *(_conv(channels, channels, (3, 9), stride=(1, 2)) for _ in range(3)),
            _conv(channels, channels, (3, 3)),
        ]


class _Complex(_Stack):
    window: Tensor

    def __init__(self, n_fft: int, channels: int) -> None:
        convs = [
            _conv(2, channels, (3, 9)),
            *(_conv(channels, channels, (3, 9), stride=(1, 2), dilation=(dilation, 1)) for dilation in (1, 2, 4)),
            _conv(channels, channels, (3, 3)),
        ]
        super().__init__(convs, _conv(channels, 1, (3, 3)), first_feature=0, slope=0.2)
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        spectra = stft(x, self.n_fft, self.n_fft // 4, self.window) / self.window.square().sum().sqrt()
        return self.judge(_real_and_imaginary(spectra))


def _conv(
    in_channels: int, out_channels: int, kernel: tuple[int, int], *, stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> nn.Module:  # fmt: skip
    padding = ((kernel[0] - 1) * dilation[0] // 2, (kernel[1] - 1) * dilation[1] // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, dilation=dilation, padding=padding)
    normed: nn.Module = weight_norm(conv)
    return normed


def _real_and_imaginary(spectra: Tensor) -> Tensor:
    """``[B, 1, F, T]`` complex to ``[B, 2, T, F]``."""
    return torch.view_as_real(spectra[:, 0].mT).movedim(-1, 1)
