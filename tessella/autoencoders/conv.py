"""The convolutional autoencoder of the VQGAN family; the published tokenizers are settings of it.

============= ==========================================================================================
IBQ           multipliers (1,1,2,2,4), num_res_blocks 4, attention_strides (16,), latent_dim 256
LlamaGen      the same with num_res_blocks 2
SimVQ         multipliers (1,2,2,4), num_decoder_res_blocks 2, bias False, mid_attention False, out_kernel 1,
              downsample "strided", upsample "depth_to_space", latent_dim 128
MaskGIT       multipliers (1,1,2,2,4), num_decoder_res_blocks 2, bias False, mid_attention False, out_kernel 1,
              downsample "pool", latent_dim 256 (4 for FSQ)
============= ==========================================================================================

MaskGIT's published weights are not of this form: where the width changes, their blocks apply the 1x1 shortcut to the
block's output ([out, out]) and not to its input, so four tensors do not fit and with 1,024 codes there are 54,515,587
parameters instead of 54,433,667; and their pictures lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from tessella.autoencoders.base import Autoencoder

Downsample = Literal["asymmetric", "strided", "pool"]
Upsample = Literal["nearest", "depth_to_space"]


class Conv(Autoencoder):
    """Residual convolutional encoder and decoder with one level per multiplier.

    Args:
        in_channels: C of the signal.
        channels: width of the first level.
        multipliers: width of each level as a multiple of ``channels``; each level after the first halves the grid.
        num_res_blocks: residual blocks a level of the encoder.
        num_decoder_res_blocks: the same of the decoder; one more than the encoder's if None, as in VQGAN.
        attention_strides: strides at whose level every residual block is followed by self-attention.
        mid_attention: self-attention between the two residual blocks at the lowest level.
        latent_dim: E.
        patch_px: pixels folded into channels before the first level (space to depth), 1 for none.
        downsample: ``asymmetric``: pad right and bottom, 3x3 stride 2 (VQGAN); ``strided``: 3x3 stride 2 with
            padding 1; ``pool``: 2x2 average.
        upsample: ``nearest``: repeat, then 3x3; ``depth_to_space``: 3x3 to 4x the channels, then rearrange.
        bias: whether the first convolution of the encoder and the residual blocks have biases.
        out_kernel: kernel of the encoder's last convolution, 1 or 3.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        num_decoder_res_blocks: int | None = None,
        attention_strides: Sequence[int] = (),
        mid_attention: bool = True,
        latent_dim: int = 256,
        patch_px: int = 1,
        downsample: Downsample = "asymmetric",
        upsample: Upsample = "nearest",
        bias: bool = True,
        out_kernel: Literal[1, 3] = 3,
    ) -> None:
        super().__init__()
        for name, value in {"channels": channels, "latent_dim": latent_dim, "patch_px": patch_px,
                            "in_channels": in_channels}.items():  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, count in {"num_res_blocks": num_res_blocks,
                            "num_decoder_res_blocks": num_decoder_res_blocks or 0}.items():  # fmt: skip
            if count < 0:
                raise ValueError(f"{name} must be at least 0, got {count}")
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"multipliers must hold at least one number, none below 1, got {list(multipliers)}")
        strides = [patch_px * 2**level for level in range(len(multipliers))]
        if unknown := set(attention_strides) - set(strides):
            raise ValueError(f"attention_strides {sorted(unknown)} are not among the levels' strides {strides}")
        self.in_channels = in_channels
        self.latent_dim = latent_dim
        self.stride = strides[-1]
        widths = [channels * multiplier for multiplier in multipliers]
        attend = [stride in attention_strides for stride in strides]
        self.encoder = Encoder(
            in_channels * patch_px**2, channels, widths, num_res_blocks, attend, mid_attention, latent_dim,
            downsample, bias, out_kernel,
        )  # fmt: skip
        self.decoder = Decoder(
            in_channels * patch_px**2, widths[::-1],
            num_res_blocks + 1 if num_decoder_res_blocks is None else num_decoder_res_blocks,
            attend[::-1], mid_attention, latent_dim, upsample, bias,
        )  # fmt: skip
        self.patch_px = patch_px

    def encode(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, H/stride, W/stride, E]``.

        Raises:
            ValueError: wrong channels, or a side that is no multiple of the stride.
        """
        self._check(x)
        return self.encoder(F.pixel_unshuffle(x, self.patch_px)).movedim(1, -1)  # type: ignore[no-any-return]

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, h, w, E]`` to ``[B, C, h*stride, w*stride]``."""
        return F.pixel_shuffle(self.decoder(latent.movedim(-1, 1)), self.patch_px)

    @property
    def last_layer(self) -> nn.Parameter:
        """See :class:`Autoencoder`."""
        return self.decoder.conv_out.get_parameter("weight")

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, H, W], got {list(x.shape)}")
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride or not (height and width):
            raise ValueError(
                f"the sides of x must be multiples of the stride {self.stride}, got {height} x {width}; "
                "crop the pictures, or let Tokenizer.encode pad them (pad=True)"
            )


class Encoder(nn.Module):
    """Signal ``[B, C, H, W]`` to features ``[B, E, h, w]``."""

    def __init__(
        self, in_channels: int, channels: int, widths: list[int], num_res_blocks: int, attend: list[bool],
        mid_attention: bool, latent_dim: int, downsample: Downsample, bias: bool, out_kernel: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)
        self.down = nn.ModuleList()
        width = channels
        for level, out in enumerate(widths):
            blocks = _level(width, out, num_res_blocks, attend[level], bias)
            width = out if blocks else width
            if level < len(widths) - 1:
                blocks.append(_DOWNSAMPLE[downsample](width))
            self.down.append(nn.Sequential(*blocks))
        self.mid = _middle(width, mid_attention, bias)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, latent_dim, out_kernel, padding=out_kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, E, h, w]``."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Features ``[B, E, h, w]`` to signal ``[B, C, H, W]``; ``widths`` and ``attend`` from the lowest level up."""

    def __init__(
        self, out_channels: int, widths: list[int], num_res_blocks: int, attend: list[bool], mid_attention: bool,
        latent_dim: int, upsample: Upsample, bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        width = widths[0]
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)
        self.mid = _middle(width, mid_attention, bias)
        self.up = nn.ModuleList()
        for level, out in enumerate(widths):
            blocks = _level(width, out, num_res_blocks, attend[level], bias)
            width = out if blocks else width
            if level < len(widths) - 1:
                blocks.append(_UPSAMPLE[upsample](width))
            self.up.append(nn.Sequential(*blocks))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """``[B, E, h, w]`` to ``[B, C, H, W]``."""
        h = self.mid(self.conv_in(latent))
        for level in self.up:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class ResBlock(nn.Module):
    """Norm, swish, 3x3, twice, beside the identity (a 1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.shortcut: nn.Module = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` to ``[B, out, H, W]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.shortcut(x) + h
        return out


class Attention(nn.Module):
    """Single-head self-attention over all positions, scale C^-1/2, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same."""
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        out: Tensor = x + self.proj_out(mixed)
        return out


class _AsymmetricDown(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _NearestUp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _DepthToSpace(nn.Module):
    """Depth to space with the block index before the channel (DCR), unlike ``pixel_shuffle`` (CRD)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        blocks: Tensor = self.conv1(x).reshape(batch, 2, 2, channels, height, width)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, 2 * height, 2 * width)


def _strided_down(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def _pooled_down(channels: int) -> nn.Module:
    return nn.AvgPool2d(2)


_DOWNSAMPLE = {"asymmetric": _AsymmetricDown, "strided": _strided_down, "pool": _pooled_down}
_UPSAMPLE = {"nearest": _NearestUp, "depth_to_space": _DepthToSpace}


def _level(in_channels: int, out_channels: int, num_res_blocks: int, attention: bool, bias: bool) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for index in range(num_res_blocks):
        blocks.append(ResBlock(in_channels if index == 0 else out_channels, out_channels, bias))
        if attention:
            blocks.append(Attention(out_channels))
    return blocks


def _middle(channels: int, attention: bool, bias: bool) -> nn.Sequential:
    blocks: list[nn.Module] = [ResBlock(channels, channels, bias), ResBlock(channels, channels, bias)]
    if attention:
        blocks.insert(1, Attention(channels))
    return nn.Sequential(*blocks)


def _norm(channels: int) -> nn.GroupNorm:
    # 32 groups as published; a width that 32 does not divide (small test models) gets the largest divisor below.
    groups = next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)
