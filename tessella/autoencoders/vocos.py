"""SEANet's encoder with Vocos' decoder, which writes spectra (WavTokenizer, arXiv 2408.16532; SimVQ's audio half)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.autoencoders.base import Autoencoder, Memory
from tessella.autoencoders.seanet import (
    Layers,
    PadMode,
    SEANetEncoder,
    Shortcut,
    check_latent,
    check_sizes,
    check_strides,
    check_wave,
)
from tessella.ops.spectral import same_istft

_LARGEST_MAGNITUDE = 1e2


class Vocos(Autoencoder):
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

    window: Tensor

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
        self.in_channels = 1
        self.latent_dim = latent_dim
        self.stride = math.prod(strides)
        check_n_fft(n_fft, self.stride)
        self.chunks_encoder = causal
        self.first_chunk = kernel
        self.n_fft = n_fft
        layers = Layers(num_res_layers, kernel, res_kernel, num_lstm_layers, shortcut, causal, pad_mode)
        self.encoder = SEANetEncoder(1, channels, latent_dim, strides, layers)
        self.backbone = Backbone(latent_dim, dim, hidden, num_blocks, dropout)
        self.head = nn.Linear(dim, n_fft + 2)
        initialise(self.head)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

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

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, t, E]`` to ``[B, 1, t stride]``.

        Raises:
            ValueError: another shape.
        """
        check_latent(latent, self.latent_dim)
        return write_spectra(self.head(self.backbone(latent)), self.n_fft, self.stride, self.window)

    @property
    def last_layer(self) -> nn.Parameter:
        """The linear layer to spectra."""
        weight = self.head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """``(ceil(T / stride),)``."""
        return tuple(-(-size // self.stride) for size in extent)


def write_spectra(features: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """``[B, t, n_fft + 2]``, logarithm of magnitude and phase of one spectrum a position, to ``[B, 1, t hop]``."""
    log_magnitude, phase = features.float().mT.chunk(2, dim=1)
    spectra = torch.polar(log_magnitude.exp().clamp(max=_LARGEST_MAGNITUDE), phase)
    return same_istft(spectra, n_fft, hop, window)[:, None]


def check_n_fft(n_fft: int, hop: int) -> None:
    """Raise ValueError unless spectra of ``n_fft`` samples fit hops of ``hop``."""
    if n_fft < hop or (n_fft - hop) % 2 or n_fft % 2:
        raise ValueError(f"n_fft must be even and exceed the stride ({hop}) by an even number, got {n_fft}")


class Backbone(nn.Module):
    """``[B, t, E]`` to ``[B, t, dim]``; its parts have the names of the published checkpoints."""

    def __init__(self, latent_dim: int, dim: int, hidden: int, num_blocks: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Conv1d(latent_dim, dim, 7, padding=3)
        self.pos_net = nn.Sequential(
            _ResBlock(dim, dropout), _ResBlock(dim, dropout), _Attention(dim), _ResBlock(dim, dropout),
            _ResBlock(dim, dropout), _group_norm(dim),
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXt(dim, hidden, 1 / num_blocks) for _ in range(num_blocks))
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialise)

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        h = self.norm(self.pos_net(self.embed(latent.mT)).mT).mT
        for block in self.convnext:
            h = block(h)
        out: Tensor = self.final_layer_norm(h.mT)
        return out


class _ResBlock(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _group_norm(dim)
        self.conv1 = nn.Conv1d(dim, dim, 3, padding=1)
        self.norm2 = _group_norm(dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        out: Tensor = x + self.conv2(self.dropout(functional.silu(self.norm2(h))))
        return out


class _Attention(nn.Module):
    """One head over all positions, scale dim^-1/2, beside the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = _group_norm(dim)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(dim, dim, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).mT for project in (self.q, self.k, self.v))
        out: Tensor = x + self.proj_out(functional.scaled_dot_product_attention(q, k, v).mT)
        return out


class ConvNeXt(nn.Module):
    """``[B, dim, t]``: depthwise convolution, norm and a perceptron, scaled, beside the identity."""

    def __init__(self, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = functional.gelu(self.pwconv1(self.norm(self.dwconv(x).mT)))
        out: Tensor = x + (self.gamma * self.pwconv2(h)).mT
        return out


def _group_norm(dim: int) -> nn.GroupNorm:
    groups = next(g for g in range(min(32, dim), 0, -1) if dim % g == 0)  # 32 as published
    return nn.GroupNorm(groups, dim, eps=1e-6)


def initialise(module: nn.Module) -> None:
    """As Vocos' published: truncated normal weights of standard deviation 0.02, zero biases."""
    if isinstance(module, (nn.Conv1d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
