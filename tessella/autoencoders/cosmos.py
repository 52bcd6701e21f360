"""The image autoencoder of the Cosmos tokenizers (arXiv 2501.03575): VQGAN's, on the Haar wavelets of patches.

It differs from :class:`tessella.autoencoders.conv.Conv` in the wavelets, where that one rearranges pixels, and in that
the last levels may keep the size of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessella.autoencoders.conv import Conv, ResBlock


class Cosmos(Conv):
    """Haar wavelets of ``patch_px``, then VQGAN's encoder with attention in the middle alone; and back.

    Args:
        in_channels: C of the signal.
        channels: width that the multipliers are of.
        multipliers: width of each level as a multiple of ``channels``.
        num_downsamples: after how many levels, from the first, the grid is halved.
        num_res_blocks: residual blocks a level of the encoder; the decoder has one more.
        latent_dim: E.
        patch_px: side of the patches, a power of 2.

    Raises:
        ValueError: a patch that is no power of 2, or more halvings than there are levels.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (2, 4, 4),
        num_downsamples: int = 2,
        num_res_blocks: int = 2,
        latent_dim: int = 256,
        patch_px: int = 4,
    ) -> None:
        if patch_px < 1 or patch_px & (patch_px - 1):
            raise ValueError(f"patch_px must be a power of 2, got {patch_px}")
        if not 0 <= num_downsamples < len(multipliers):
            raise ValueError(f"num_downsamples must be from 0 to {len(multipliers) - 1}, got {num_downsamples}")
        super().__init__(
            in_channels=in_channels * patch_px**2, channels=channels, multipliers=multipliers,
            num_res_blocks=num_res_blocks, latent_dim=latent_dim,
        )  # fmt: skip
        for levels in (self.encoder.down, self.decoder.up):
            for place in range(num_downsamples, len(multipliers) - 1):
                level = levels[place]
                assert isinstance(level, nn.Sequential)
                levels[place] = nn.Sequential(*(block for block in level if isinstance(block, ResBlock)))
        self.in_channels = in_channels
        self.num_wavelets = patch_px.bit_length() - 1
        self.stride = patch_px * 2**num_downsamples

    def encode(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, H/stride, W/stride, E]``; errors as of :meth:`Conv.encode`."""
        self._check(x)
        for _ in range(self.num_wavelets):
            x = haar(x)
        features: Tensor = self.encoder(x)
        return features.movedim(1, -1)

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, h, w, E]`` to ``[B, C, h*stride, w*stride]``."""
        x: Tensor = self.decoder(latent.movedim(-1, 1))
        for _ in range(self.num_wavelets):
            x = inverse_haar(x)
        return x


def haar(x: Tensor) -> Tensor:
    """One level of the wavelet transform: ``[B, C, H, W]`` to ``[B, 4 C, H/2, W/2]``.

    The four bands follow each other, all channels of each: means of 2 x 2 pixels, half the differences of rows, of
    columns, and of both.
    """
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1) / 4


def inverse_haar(x: Tensor) -> Tensor:
    """The inverse of :func:`haar`."""
    low, rows, columns, both = x.chunk(4, dim=1)
    upper = torch.stack([low + rows + columns + both, low + rows - columns - both], -1).flatten(-2)
    lower = torch.stack([low - rows + columns - both, low - rows - columns + both], -1).flatten(-2)
    return torch.stack([upper, lower], -2).flatten(-3, -2)
