"""A picture, for dense prediction and translation between pictures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tessella.conditioners.base import Conditioner
from tessella.transformer import Transformer

Stem = Literal["linear", "conv"]

_GROUPS = 4


class Image(Conditioner):
    """The patches of a picture, encoded by a small ViT: learned positions, LayerNorm before each layer, tanh GELU.

    Args:
        size_px: height and width.
        patch_px: side of a patch; divides both.
        dim, dropout: see :class:`Conditioner`. The null is one learned vector at every place.
        num_layers: blocks of the encoder.
        num_heads: of its attention.
        channels: of the picture.
        stem: ``linear``: each patch through one linear layer, as in ViT; ``conv``: strided 3x3 convolutions that halve
            the picture down to one place a patch, each but the first of twice the width of the one before (Xiao et al.,
            arXiv 2106.14881), which learns more from few pictures.

    Raises:
        ValueError: patches that do not fit the picture, or for ``conv`` a side that is no power of two.
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
        stem: Stem = "linear",
    ) -> None:
        super().__init__(dim, dropout=dropout)
        height, width = size_px
        if patch_px < 1 or height % patch_px or width % patch_px:
            raise ValueError(f"patch_px must divide both sides of size_px, {height} x {width}, got {patch_px}")
        self.shape = (channels, height, width)
        self.num_patches = (height // patch_px) * (width // patch_px)
        self.patches: nn.Module = (
            nn.Conv2d(channels, dim, patch_px, stride=patch_px)
            if stem == "linear"
            else _conv_stem(channels, dim, patch_px)
        )
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


def _conv_stem(channels: int, dim: int, patch_px: int) -> nn.Sequential:
    halvings = patch_px.bit_length() - 1
    if patch_px != 2**halvings or dim % (_GROUPS * 2**halvings):
        raise ValueError(f"a stem of convolutions needs patch_px to be a power of two, 2^n, and dim a multiple of "
                         f"{_GROUPS} x 2^n, got {patch_px} and {dim}")  # fmt: skip
    layers: list[nn.Module] = []
    for halving in range(halvings):
        width = dim // 2 ** (halvings - 1 - halving)
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(_GROUPS, width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, dim, 1))
