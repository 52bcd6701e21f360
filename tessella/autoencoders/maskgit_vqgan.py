"""The convolutional autoencoder of MaskGIT (arXiv 2202.04200), as its released weights need it.

It differs from :class:`tessella.autoencoders.conv.Conv` with MaskGIT's settings, which is what one would train, in a
slip that the weights have learned with: where a residual block changes the width, its 1x1 convolution sees the block's
output instead of its input. And its pictures lie in [0, 1]; as the first convolution pads with zeros, which is grey in
one range and black in the other, the range cannot be moved into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tessella.autoencoders.conv import Conv, ResBlock


class MaskGITVQGAN(Conv):
    """Residual blocks without biases or attention, average pooling down, nearest neighbour and 3x3 up.

    Args:
        in_channels: C of the signal.
        channels: width of the first level.
        multipliers: width of each level as a multiple of ``channels``.
        num_res_blocks: residual blocks a level, in encoder and decoder.
        latent_dim: E.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        latent_dim: int = 256,
    ) -> None:
        super().__init__(
            in_channels=in_channels, channels=channels, multipliers=multipliers, num_res_blocks=num_res_blocks,
            num_decoder_res_blocks=num_res_blocks, mid_attention=False, latent_dim=latent_dim, downsample="pool",
            bias=False, out_kernel=1,
        )  # fmt: skip
        for level in (*self.encoder.down, *self.decoder.up):
            assert isinstance(level, nn.Sequential)
            for index, block in enumerate(level):
                if isinstance(block, ResBlock) and block.conv1.in_channels != block.conv1.out_channels:
                    level[index] = OutputShortcut(block.conv1.in_channels, block.conv1.out_channels)

    def encode(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [-1, 1] to ``[B, h, w, E]``; see :meth:`Conv.encode`."""
        return super().encode((x + 1) / 2)

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, h, w, E]`` to ``[B, C, H, W]`` around [-1, 1]."""
        return 2 * super().decode(latent) - 1


class OutputShortcut(ResBlock):
    """A residual block whose 1x1 convolution sees what it is added to."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)
        self.shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` to ``[B, out, H, W]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + self.shortcut(h)
        return out
