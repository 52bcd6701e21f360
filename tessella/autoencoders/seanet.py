"""SEANet, the convolutional autoencoder of waveforms of SoundStream and EnCodec (arXiv 2107.03312, 2210.13438)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from tessella.autoencoders.base import Autoencoder, Memory

PadMode = Literal["reflect", "constant"]
Shortcut = Literal["conv", "identity"]


class SEANet(Autoencoder):
    """Waveforms ``[B, C, T]`` to latents ``[B, ceil(T / stride), E]`` and back to ``[B, C, stride tokens]``.

    Encoder: a convolution, then for each stride residual layers, ELU and a convolution that doubles the width, at last
    an LSTM beside the identity, ELU and a convolution to E. The decoder mirrors it. All convolutions are
    weight-normalised.

    Args:
        in_channels: C.
        channels: width at full rate.
        latent_dim: E.
        strides: of the encoder's stages, first to last.
        num_res_layers: residual layers a stage; the dilation doubles from one to the next.
        kernel: of the first and the last convolution.
        res_kernel: of the residual layers.
        num_lstm_layers: 0 for none.
        shortcut: beside the residual layers.
        causal: whether a latent depends on the samples up to the end of its own hop alone. With ``pad_mode``
            ``"reflect"`` the first latents of a file see some of what follows, since the file's start is mirrored.
        pad_mode: what is before the first sample.

    Raises:
        ValueError: a number below 1, no strides.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        channels: int = 32,
        latent_dim: int = 128,
        strides: Sequence[int] = (2, 4, 5, 8),
        num_res_layers: int = 1,
        kernel: int = 7,
        res_kernel: int = 3,
        num_lstm_layers: int = 2,
        shortcut: Shortcut = "conv",
        causal: bool = True,
        pad_mode: PadMode = "reflect",
    ) -> None:
        super().__init__()
        check_strides(strides)
        check_sizes(in_channels=in_channels, channels=channels, latent_dim=latent_dim, kernel=kernel,
                    res_kernel=res_kernel, num_res_layers=num_res_layers)  # fmt: skip
        layers = Layers(num_res_layers, kernel, res_kernel, num_lstm_layers, shortcut, causal, pad_mode)
        self.in_channels = in_channels
        self.latent_dim = latent_dim
        self.stride = math.prod(strides)
        self.causal = self.chunks_encoder = self.chunks_decoder = causal
        self.first_chunk = kernel
        self.encoder = SEANetEncoder(in_channels, channels, latent_dim, strides, layers)
        self.decoder = SEANetDecoder(in_channels, channels, latent_dim, strides, layers)

    def encode(self, x: Tensor) -> Tensor:
        """``[B, C, T]`` to ``[B, ceil(T / stride), E]``.

        Raises:
            ValueError: another shape, or no sample.
        """
        check_wave(x, self.in_channels)
        latent: Tensor = self.encoder(x).mT
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, t, E]`` to ``[B, C, t stride]``.

        Raises:
            ValueError: another shape.
        """
        check_latent(latent, self.latent_dim)
        x_hat: Tensor = self.decoder(latent.mT)
        return x_hat

    def encode_chunk(self, x: Tensor, memory: Memory) -> Tensor:
        """See :meth:`Autoencoder.encode_chunk`."""
        if not self.causal:
            return super().encode_chunk(x, memory)
        check_wave(x, self.in_channels)
        latent: Tensor = self.encoder(x, memory).mT
        return latent

    def decode_chunk(self, latent: Tensor, memory: Memory) -> Tensor:
        """See :meth:`Autoencoder.decode_chunk`."""
        if not self.causal:
            return super().decode_chunk(latent, memory)
        check_latent(latent, self.latent_dim)
        x_hat: Tensor = self.decoder(latent.mT, memory)
        return x_hat

    @property
    def last_layer(self) -> nn.Parameter:
        """Directions of the last convolution."""
        return self.decoder.last.direction

    @property
    def num_axes(self) -> int:
        """Time alone."""
        return 1

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """``(ceil(T / stride),)``."""
        return tuple(-(-size // self.stride) for size in extent)


class Layers:
    """How the layers of encoder and decoder are made; see :class:`SEANet`."""

    def __init__(
        self, num_res_layers: int, kernel: int, res_kernel: int, num_lstm_layers: int, shortcut: Shortcut,
        causal: bool, pad_mode: PadMode,
    ) -> None:  # fmt: skip
        self.num_res_layers, self.kernel, self.res_kernel = num_res_layers, kernel, res_kernel
        self.num_lstm_layers, self.shortcut = num_lstm_layers, shortcut
        self.causal, self.pad_mode = causal, pad_mode

    def conv(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1
    ) -> CausalConv:
        """One convolution."""
        return CausalConv(
            in_channels, out_channels, kernel, stride=stride, dilation=dilation, causal=self.causal,
            pad_mode=self.pad_mode,
        )  # fmt: skip

    def residual(self, channels: int) -> list[nn.Module]:
        """The residual layers of a stage."""
        return [_Residual(channels, 2**layer, self) for layer in range(self.num_res_layers)]

    def lstm(self, channels: int) -> list[nn.Module]:
        """The LSTM, if there is one."""
        return [_LSTM(channels, self.num_lstm_layers)] if self.num_lstm_layers else []


class _Chain(nn.Module):
    """Layers in a row; those with a memory are given it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = nn.ModuleList(layers)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        for layer in self.model:
            x = layer(x) if isinstance(layer, nn.ELU) else layer(x, memory)
        return x


class SEANetEncoder(_Chain):
    """See :class:`SEANet`; layers are numbered as in the published checkpoints."""

    def __init__(
        self, in_channels: int, channels: int, latent_dim: int, strides: Sequence[int], layers: Layers
    ) -> None:
        chain: list[nn.Module] = [layers.conv(in_channels, channels, layers.kernel)]
        width = channels
        for stride in strides:
            chain += layers.residual(width)
            chain += [nn.ELU(), layers.conv(width, 2 * width, 2 * stride, stride=stride)]
            width *= 2
        chain += [*layers.lstm(width), nn.ELU(), layers.conv(width, latent_dim, layers.kernel)]
        super().__init__(chain)


class SEANetDecoder(_Chain):
    """See :class:`SEANet`."""

    def __init__(
        self, in_channels: int, channels: int, latent_dim: int, strides: Sequence[int], layers: Layers
    ) -> None:
        width = channels * 2 ** len(strides)
        chain: list[nn.Module] = [layers.conv(latent_dim, width, layers.kernel), *layers.lstm(width)]
        for stride in reversed(strides):
            chain += [nn.ELU(), CausalTransposed(width, width // 2, stride, causal=layers.causal)]
            width //= 2
            chain += layers.residual(width)
        super().__init__([*chain, nn.ELU(), layers.conv(width, in_channels, layers.kernel)])

    @property
    def last(self) -> CausalConv:
        """The convolution to the waveform."""
        layer = self.model[-1]
        assert isinstance(layer, CausalConv)
        return layer


class CausalConv(nn.Module):
    """A weight-normalised convolution of ``[B, C, T]`` that gives ceil(T / stride) frames.

    (kernel - 1) dilation - (stride - 1) samples are put before the first one if ``causal``, otherwise the larger half
    of them, and the rest behind the last; further ones behind, so that the last window is full.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1,
        causal: bool = True, pad_mode: PadMode = "reflect",
    ) -> None:  # fmt: skip
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel, stride=stride, dilation=dilation)
        _keep_variance(conv, in_channels * kernel)
        self.conv = weight_norm(conv)
        self.stride = stride
        self.padding = (kernel - 1) * dilation - (stride - 1)
        self.causal = causal
        self.pad_mode = pad_mode

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """``[B, in, T]`` to ``[B, out, ceil(T / stride)]``; ``memory`` holds the samples before ``x``."""
        more = -x.shape[-1] % self.stride
        if memory is not None and self in memory:
            x, widths = torch.cat([memory[self][0], x], -1), (0, more)
        else:
            right = 0 if self.causal else self.padding // 2
            widths = (self.padding - right, right + more)
        if self.pad_mode == "reflect":
            x = pad_reflecting(x, widths)
        elif any(widths):  # otherwise a copy
            x = functional.pad(x, widths)
        if memory is not None:
            memory[self] = (x[..., x.shape[-1] - self.padding :],)
        out: Tensor = self.conv(x)
        return out

    @property
    def direction(self) -> nn.Parameter:
        """The weight before its rows are scaled."""
        weight = self.conv.parametrizations.weight.original1
        assert isinstance(weight, nn.Parameter)
        return weight


class CausalTransposed(nn.Module):
    """A weight-normalised transposed convolution of kernel 2 stride: ``[B, C, T]`` to ``[B, C', T stride]``.

    The ``stride`` samples too many are cut off behind if ``causal``, otherwise the larger half of them in front.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, causal: bool = True) -> None:
        super().__init__()
        conv = nn.ConvTranspose1d(in_channels, out_channels, 2 * stride, stride=stride)
        _keep_variance(conv, 2 * in_channels)
        self.conv = weight_norm(conv)
        self.stride = stride
        self.causal = causal

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """``memory`` holds the frame before ``x``, which reaches into its first hop."""
        past = 0
        if memory is not None:
            if self in memory:
                x, past = torch.cat([memory[self][0], x], -1), self.stride
            memory[self] = (x[..., -1:],)
        out: Tensor = self.conv(x)
        right = self.stride if self.causal else self.stride // 2
        return out[..., past + self.stride - right : out.shape[-1] - right]


class _Residual(nn.Module):
    """Two convolutions, to half the width and back, beside a shortcut."""

    def __init__(self, channels: int, dilation: int, layers: Layers) -> None:
        super().__init__()
        hidden = channels // 2
        self.block = _Chain([
            nn.ELU(), layers.conv(channels, hidden, layers.res_kernel, dilation=dilation),
            nn.ELU(), layers.conv(hidden, channels, 1),
        ])  # fmt: skip
        self.shortcut = layers.conv(channels, channels, 1) if layers.shortcut == "conv" else None

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        beside = x if self.shortcut is None else self.shortcut(x, memory)
        out: Tensor = beside + self.block(x, memory)
        return out


class _LSTM(nn.Module):
    """An LSTM beside the identity."""

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, num_layers, batch_first=True)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        state = None if memory is None or self not in memory else memory[self]
        out, state = self.lstm(x.mT, state)
        if memory is not None:
            memory[self] = state
        mixed: Tensor = x + out.mT
        return mixed


def _keep_variance(conv: nn.Conv1d | nn.ConvTranspose1d, num_inputs: int) -> None:
    """Weights N(0, 1 / num_inputs) and no bias.

    With torch's own defaults speech would leave the encoder a fifteenth as strong as it entered, below the biases, and
    a quantizer would find one code nearest to all of it.
    """
    nn.init.normal_(conv.weight, std=num_inputs**-0.5)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def pad_reflecting(x: Tensor, widths: tuple[int, int]) -> Tensor:
    """``x [B, C, T]`` mirrored at its ends; one too short for that is first extended by zeros behind.

    Joined of its parts: torch's own reflection takes as long as a convolution at full rate.
    """
    left, right = widths
    missing = max(left - x.shape[-1] + 1, right - x.shape[-1] + 1, 0)
    if missing:
        x = functional.pad(x, (0, missing))
    parts = [x]
    if left:
        parts.insert(0, x[..., 1 : left + 1].flip(-1))
    if right:
        parts.append(x[..., -right - 1 : -1].flip(-1))
    padded = torch.cat(parts, -1) if len(parts) > 1 else x
    return padded[..., : padded.shape[-1] - missing]


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless all are at least 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_strides(strides: Sequence[int]) -> None:
    """Raise ValueError unless there are strides, all of them positive."""
    if not strides or min(strides) < 1:
        raise ValueError(f"strides must be whole numbers of at least 1, got {list(strides)}")


def check_wave(x: Tensor, in_channels: int) -> None:
    """Raise ValueError unless ``x`` is ``[B, in_channels, T]`` with at least one sample."""
    if x.ndim != 3 or x.shape[1] != in_channels or not x.shape[2]:
        raise ValueError(f"x must be [B, {in_channels}, T] with T at least 1, got {list(x.shape)}")


def check_latent(latent: Tensor, latent_dim: int) -> None:
    """Raise ValueError unless ``latent`` is ``[B, t, latent_dim]`` with at least one position."""
    if latent.ndim != 3 or latent.shape[2] != latent_dim or not latent.shape[1]:
        raise ValueError(f"latent must be [B, t, {latent_dim}] with t at least 1, got {list(latent.shape)}")
