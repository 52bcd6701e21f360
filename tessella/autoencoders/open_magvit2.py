"""The autoencoder of Open-MAGVIT2 (arXiv 2409.04410): before every level of the decoder, the latents set its style.

Beside :class:`tessella.autoencoders.conv.Conv` with the settings of SimVQ, which come from here, it has adaptive group
norms and as many residual blocks in the middle as in a level.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tessella.autoencoders.conv import Conv, ResBlock

_GROUPS = 32
_EPS = 1e-6


class OpenMAGVIT2(Conv):
    """Residual blocks without biases or attention, strided convolutions down, depth to space up, adaptive norms.

    Args:
        in_channels: C of the signal.
        channels: width of the first level, a multiple of 32.
        multipliers: width of each level as a multiple of ``channels``.
        num_res_blocks: residual blocks of a level and of the middle, in encoder and decoder.
        latent_dim: E, the number of bits of a token.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 4,
        latent_dim: int = 18,
    ) -> None:
        super().__init__(
            in_channels=in_channels, channels=channels, multipliers=multipliers, num_res_blocks=num_res_blocks,
            num_decoder_res_blocks=num_res_blocks, mid_attention=False, latent_dim=latent_dim, downsample="strided",
            upsample="depth_to_space", bias=False, out_kernel=1,
        )  # fmt: skip
        if channels % _GROUPS:
            raise ValueError(f"channels must be a multiple of {_GROUPS}, got {channels}")
        widths = [channels * multiplier for multiplier in multipliers][::-1]
        for half in (self.encoder, self.decoder):
            half.mid = nn.Sequential(*(ResBlock(widths[0], widths[0], bias=False) for _ in range(num_res_blocks)))
        # Each is before its level, so as wide as the one below.
        self.styles = nn.ModuleList(AdaptiveGroupNorm(latent_dim, width) for width in [widths[0], *widths[:-1]])

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, h, w, E]`` to ``[B, C, h*stride, w*stride]``; at least two positions, for their spread is the style."""
        style = latent.movedim(-1, 1)
        h = self.decoder.mid(self.decoder.conv_in(style))
        for norm, level in zip(self.styles, self.decoder.up, strict=True):
            h = level(norm(h, style))
        out: Tensor = self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))
        return out


class AdaptiveGroupNorm(nn.Module):
    """Group norm, scaled by a linear map of the latents' deviation over positions and shifted by one of their mean."""

    def __init__(self, latent_dim: int, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(latent_dim, channels)
        self.beta = nn.Linear(latent_dim, channels)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """``x [B, C, H, W]``, ``latent [B, E, h, w]``."""
        positions = latent.flatten(2)
        scale: Tensor = self.gamma((positions.var(-1) + _EPS).sqrt())
        shift: Tensor = self.beta(positions.mean(-1))
        return scale[..., None, None] * F.group_norm(x, _GROUPS, eps=_EPS) + shift[..., None, None]
