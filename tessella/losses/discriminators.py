"""Discriminators: networks that tell pictures from reconstructions."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.config import Configurable
from tessella.distributed import differentiable_mean, world_size
from tessella.quantizers.base import full_precision


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose batch is that of all ranks; torch's SyncBatchNorm is for GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, C, H, W]``, as many on every rank."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            values = full_precision(x)
            mean = differentiable_mean(values.mean((0, 2, 3)))
            centred = values - mean[:, None, None]
            variance = differentiable_mean(centred.square().mean((0, 2, 3)))
            self._remember(mean.detach(), variance.detach(), values.numel() // len(mean) * world_size())
            scale = self.weight * (variance + self.eps).rsqrt()
            return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked.add_(1)


class PatchGAN(Configurable, nn.Module):
    """One logit for each overlapping patch (Isola et al., arXiv 1611.07004), as in the VQGAN family.

    4x4 convolutions: ``num_layers`` of stride 2, one of stride 1 and the last, to one channel; batch normalisation on
    all but the outer two. With the default three layers a logit sees 70x70 pixels. The state-dict keys are those of the
    published checkpoints.

    Args:
        channels: width after the first convolution; it doubles with each layer up to 8 times that.
        num_layers: strided convolutions.
        in_channels: C of the pictures.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, in_channels: int = 3) -> None:
        super().__init__()
        _check_at_least_1(channels=channels, num_layers=num_layers, in_channels=in_channels)
        self.in_channels = in_channels
        self.min_px = 3 * 2**num_layers
        widths = [channels * min(2**layer, 8) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                BatchNorm(widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 1, h, w]`` of pictures ``x [B, C, H, W]`` in [-1, 1]; h = H / 2^num_layers - 2.

        Raises:
            ValueError: wrong channels, or a side below ``min_px``.
        """
        _check_pictures(x, self.in_channels)
        if min(x.shape[2:]) < self.min_px:
            raise ValueError(f"this PatchGAN needs pictures of at least {self.min_px} px, got "
                             f"{x.shape[2]} x {x.shape[3]}; take larger crops or fewer layers")  # fmt: skip
        logits: Tensor = self.main(x)
        return logits


class StyleGAN(Configurable, nn.Module):
    """One logit a picture: the residual discriminator of StyleGAN2 (arXiv 1912.04958) with blurred downsampling.

    As in the JAX VQGANs (MaskGIT, MAGVIT): no normalisation, so that R1 may be used; Glorot weights without runtime
    scaling; width doubling with each halving of the picture. Two things are not theirs. They double up to 512 channels
    whatever the first width, this one up to 8 times ``channels``: the same at the default, narrower below it. And the
    minibatch standard deviation before the last convolutions is StyleGAN2's, which they leave out; through it a logit
    depends a little on the other pictures of the batch.

    Args:
        size_px: side of the (square) pictures, a power of two from 16.
        channels: width at full resolution.
        in_channels: C of the pictures.
    """

    min_px: ClassVar[int] = 16

    def __init__(self, size_px: int, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        _check_at_least_1(channels=channels, in_channels=in_channels)
        if size_px < self.min_px or size_px & (size_px - 1):
            raise ValueError(f"size_px must be a power of two from {self.min_px}, got {size_px}")
        self.size_px = size_px
        self.in_channels = in_channels
        num_blocks = int(math.log2(size_px)) - 2  # down to 4x4
        widths = [channels * min(2**block, 8) for block in range(num_blocks + 1)]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(_DownBlock(widths[i], widths[i + 1]) for i in range(num_blocks)))
        self.conv_out = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.dense = nn.Conv2d(widths[-1], widths[-1], 4)  # of all 4x4 positions: a dense layer
        self.logit = nn.Linear(widths[-1], 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 1]`` of pictures ``x [B, C, size_px, size_px]`` in [-1, 1].

        Raises:
            ValueError: wrong channels or another size.
        """
        _check_pictures(x, self.in_channels)
        if x.shape[2:] != (self.size_px, self.size_px):
            raise ValueError(f"this StyleGAN discriminator takes pictures of {self.size_px} x {self.size_px} px, "
                             f"got {x.shape[2]} x {x.shape[3]}")  # fmt: skip
        h = self.blocks(_leaky_relu(self.conv_in(x)))
        h = _leaky_relu(self.conv_out(torch.cat([h, minibatch_stddev(h)], 1)))
        logits: Tensor = self.logit(_leaky_relu(self.dense(h)).flatten(1))
        return logits


class BlurPool(nn.Module):
    """Half the resolution through the filter [1, 3, 3, 1] / 8 along each axis (arXiv 1904.11486), zeros outside."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H/2, W/2]``."""
        channels = x.shape[1]
        return functional.conv2d(x, self.kernel.expand(channels, -1, -1, -1), stride=2, padding=1, groups=channels)


class _DownBlock(nn.Module):
    """Two 3x3 convolutions around a blurred halving, beside a blurred and projected identity."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.blur = BlurPool()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blur(_leaky_relu(self.conv1(x)))
        h = _leaky_relu(self.conv2(h))
        out: Tensor = (self.shortcut(self.blur(x)) + h) / math.sqrt(2)  # the sum of two, at the variance of one
        return out


def minibatch_stddev(x: Tensor, group_size: int = 4) -> Tensor:
    """How much pictures differ from others of the batch, ``[B, 1, H, W]`` of ``x [B, C, H, W]`` (arXiv 1710.10196).

    The standard deviation over a group of pictures, averaged over channels and positions. Groups have ``group_size``
    members, or the largest smaller number that divides B.
    """
    batch, _, height, width = x.shape
    group = next(size for size in range(min(group_size, batch), 0, -1) if batch % size == 0)
    members = full_precision(x).reshape(group, batch // group, -1)
    stddev = (members.var(0, correction=0) + 1e-8).sqrt().mean(1)  # [B / group]
    return stddev.repeat(group).to(x.dtype)[:, None, None, None].expand(batch, 1, height, width)


def _leaky_relu(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, 0.2)


def _check_at_least_1(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_pictures(x: Tensor, in_channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x must be [B, {in_channels}, H, W], got {list(x.shape)}")
