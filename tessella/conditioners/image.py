"""A picture, for dense prediction and translation between pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.conditioners.base import Conditioner
from tessella.transformer import Transformer


class Image(Conditioner):
    """The patches of a picture, encoded by a small ViT: learned positions, LayerNorm before each layer, tanh GELU.

    Args:
        size_px: height and width.
        patch_px: side of a patch; divides both.
        dim, dropout: see :class:`Conditioner`. The null is one learned vector at every place.
        num_layers: blocks of the encoder.
        num_heads: of its attention.
        channels: of the picture.
    """

    batch_key = "context"

    def __init__(
        self,
        size_px: tuple[int, int],
        patch_px: int,
        dim: int,
        *,
        num_layers: int = 6,
        num_heads: int = 12,
        channels: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(dim, dropout=dropout)
        height, width = size_px
        if patch_px < 1 or height % patch_px or width % patch_px:
            raise ValueError(f"patch_px must divide both sides of size_px, {height} x {width}, got {patch_px}")
        self.shape = (channels, height, width)
        self.num_patches = (height // patch_px) * (width // patch_px)
        self.patches = nn.Conv2d(channels, dim, patch_px, stride=patch_px)
        self.positions = nn.Parameter(torch.empty(self.num_patches, dim))
        self.encoder = Transformer(
            dim, num_layers, num_heads, norm="layer", activation="gelu_tanh", bias=True, causal=False
        )
        self.nothing = nn.Parameter(torch.empty(dim))
        # Tokens of about unit size at the first block, as in ViT.
        nn.init.normal_(self.positions, std=dim**-0.5)
        nn.init.normal_(self.nothing, std=0.02)

    @property
    def length(self) -> int:
        """See :attr:`Conditioner.length`; the patches in raster order."""
        return self.num_patches

    def null(self, batch_size: int) -> Tensor:
        """See :meth:`Conditioner.null`."""
        return self.nothing.expand(batch_size, self.num_patches, -1)

    def embed(self, condition: Tensor) -> Tensor:
        """See :meth:`Conditioner.embed`; ``condition [B, C, H, W]`` in [-1, 1]."""
        if tuple(condition.shape[1:]) != self.shape:
            channels, height, width = self.shape
            raise ValueError(f"pictures must be [B, {channels}, {height}, {width}], got {list(condition.shape)}")
        tokens = self.patches(condition).flatten(2).transpose(1, 2)
        encoded: Tensor = self.encoder(tokens + self.positions)
        return encoded
