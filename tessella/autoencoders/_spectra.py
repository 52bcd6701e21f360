"""Decoders of waveforms that write spectra at the rate of the tokens (Vocos, arXiv 2306.00814)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.autoencoders.base import Autoencoder
from tessella.autoencoders.seanet import check_latent
from tessella.ops.spectral import same_istft

_LARGEST_MAGNITUDE = 1e2


class SpectralDecoder(Autoencoder):
    """The half of an autoencoder ``[B, 1, T]`` whose decoder ends in a linear layer to spectra.

    Subclasses add ``backbone``, ``[B, t, E]`` to ``[B, t, dim]``, and the encoder.
    """

    backbone: nn.Module
    head: nn.Linear
    window: Tensor

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, t, E]`` to ``[B, 1, t stride]``: logarithm of magnitude and phase of a spectrum a position, inverted.

        Raises:
            ValueError: another shape.
        """
        check_latent(latent, self.latent_dim)
        features = self.head(self.backbone(latent)).float()
        log_magnitude, phase = features.mT.chunk(2, dim=1)
        spectra = torch.polar(log_magnitude.exp().clamp(max=_LARGEST_MAGNITUDE), phase)
        return same_istft(spectra, self.n_fft, self.stride, self.window)[:, None]

    @property
    def last_layer(self) -> nn.Parameter:
        """The linear layer to spectra."""
        weight = self.head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """``(ceil(T / stride),)``."""
        return tuple(-(-size // self.stride) for size in extent)

    def _set_sizes(self, latent_dim: int, stride: int, n_fft: int) -> None:
        """Raise ValueError unless spectra of ``n_fft`` samples fit the stride."""
        if n_fft < stride or (n_fft - stride) % 2 or n_fft % 2:
            raise ValueError(f"n_fft must be even and exceed the stride ({stride}) by an even number, got {n_fft}")
        self.in_channels = 1
        self.latent_dim, self.stride, self.n_fft = latent_dim, stride, n_fft

    def _add_head(self, dim: int) -> None:
        self.head = nn.Linear(dim, self.n_fft + 2)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)


class Backbone(nn.Module):
    """``[B, t, in]`` to ``[B, t, dim]``; its parts have the names of the published checkpoints of Vocos.

    Args:
        in_features: of each position.
        dim: width.
        hidden: inner width of the ConvNeXt blocks.
        num_blocks: of them.
        dropout: of the residual blocks before them, around an attention over all positions; None leaves these out.
    """

    def __init__(self, in_features: int, dim: int, hidden: int, num_blocks: int, dropout: float | None) -> None:
        super().__init__()
        self.embed = nn.Conv1d(in_features, dim, 7, padding=3)
        self.pos_net: nn.Module = nn.Identity() if dropout is None else nn.Sequential(
            _ResBlock(dim, dropout), _ResBlock(dim, dropout), _Attention(dim), _ResBlock(dim, dropout),
            _ResBlock(dim, dropout), _group_norm(dim),
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXt(dim, hidden, 1 / num_blocks) for _ in range(num_blocks))
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = self.norm(self.pos_net(self.embed(x.mT)).mT).mT
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
