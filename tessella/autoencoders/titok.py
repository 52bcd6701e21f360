"""The one-dimensional autoencoder of TiTok (arXiv 2406.07550), as its released weights need it.

It differs from :class:`tessella.autoencoders.vit.ViT` with ``num_latents``, which is what one would train: learned
positions and a class token in both halves, a norm before the blocks, halves of different sizes, pictures in [0, 1], and
a 3x3 convolution on the pixels in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.autoencoders.base import Autoencoder
from tessella.transformer import Transformer

_MLP_RATIO = 4


class TiTok(Autoencoder):
    """Patches and latent tokens through one transformer, latent and mask tokens through another.

    Args:
        size_px: side of the pictures.
        patch_px: side of a patch.
        num_latents: latent tokens of a picture.
        latent_dim: E.
        encoder_width, encoder_depth, encoder_heads: of the first transformer.
        decoder_width, decoder_depth, decoder_heads: of the second.

    Raises:
        ValueError: a size that the patch does not divide, or a width that the heads do not.
    """

    def __init__(
        self,
        *,
        size_px: int = 256,
        patch_px: int = 16,
        num_latents: int = 32,
        latent_dim: int = 12,
        encoder_width: int = 1024,
        encoder_depth: int = 24,
        encoder_heads: int = 16,
        decoder_width: int = 1024,
        decoder_depth: int = 24,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        if size_px % patch_px:
            raise ValueError(f"size_px must be a multiple of patch_px ({patch_px}), got {size_px}")
        self.in_channels = 3
        self.patch_px = patch_px
        self.num_latents = num_latents
        self.latent_dim = latent_dim
        self.stride = size_px
        self.grid = size_px // patch_px
        num_patches = self.grid**2
        self.patch_in = nn.Conv2d(3, encoder_width, patch_px, stride=patch_px)
        self.queries = nn.Parameter(torch.randn(num_latents, encoder_width) * encoder_width**-0.5)
        self.encoder = Half(encoder_width, encoder_depth, encoder_heads, num_patches, num_latents)
        self.to_latent = nn.Linear(encoder_width, latent_dim)
        self.from_latent = nn.Linear(latent_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.randn(decoder_width) * decoder_width**-0.5)
        self.decoder = Half(decoder_width, decoder_depth, decoder_heads, num_patches, num_latents)
        self.build_head(decoder_width)

    def build_head(self, width: int) -> None:
        """Register what makes a picture of the decoder's features."""
        self.patch_out = nn.Linear(width, 3 * self.patch_px**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        """``[B, 3, size_px, size_px]`` in [-1, 1] to ``[B, num_latents, E]``.

        Raises:
            ValueError: pictures of another size.
        """
        if tuple(x.shape[1:]) != (3, self.stride, self.stride):
            raise ValueError(f"x must be [B, 3, {self.stride}, {self.stride}], got {list(x.shape)}; crop the pictures, "
                             "or let Tokenizer.encode pad smaller ones (pad=True)")  # fmt: skip
        patches = self.patch_in((x + 1) / 2).flatten(2).mT
        tokens = self.encoder(patches, self.queries.expand(x.shape[0], -1, -1))[:, 1 + self.grid**2 :]
        latent: Tensor = self.to_latent(self.arrange(tokens))
        return latent

    def arrange(self, tokens: Tensor) -> Tensor:
        """What the last layer of the encoder sees of its ``tokens [B, num_latents, width]``."""
        return tokens

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, num_latents, E]`` to ``[B, 3, size_px, size_px]`` around [-1, 1]."""
        masks = self.mask_token.expand(latent.shape[0], self.grid**2, -1)
        tokens = self.decoder(masks, self.from_latent(latent))[:, 1 : 1 + self.grid**2]
        return 2 * self.picture(tokens) - 1

    def picture(self, tokens: Tensor) -> Tensor:
        """``[B, 3, H, W]`` around [0, 1] of the decoder's ``tokens [B, patches, width]``."""
        # [B, rows, columns, p, p, 3]: the pixels of a patch have their colours last.
        pixels = self.patch_out(tokens).unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch_px, -1, 3))
        out: Tensor = self.conv_out(pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, self.stride, self.stride))
        return out

    @property
    def last_layer(self) -> nn.Parameter:
        """See :class:`Autoencoder`."""
        return self.conv_out.get_parameter("weight")

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """``(num_latents,)``, of every picture."""
        return (self.num_latents,)


class Half(nn.Module):
    """A class token, a place for every patch and a latent token each, with learned positions, through a transformer."""

    def __init__(self, width: int, depth: int, num_heads: int, num_patches: int, num_latents: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.class_token = nn.Parameter(torch.randn(width) * scale)
        self.positions = nn.Parameter(torch.randn(1 + num_patches, width) * scale)
        self.latent_positions = nn.Parameter(torch.randn(num_latents, width) * scale)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, depth, num_heads, hidden=_MLP_RATIO * width, norm="layer", activation="gelu", bias=True, causal=False
        )

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        """``[B, 1 + patches + latents, width]``, normalised."""
        places = torch.cat([self.class_token.expand(patches.shape[0], 1, -1), patches], 1) + self.positions
        tokens = torch.cat([places, latents + self.latent_positions], 1)
        out: Tensor = self.transformer(self.norm_in(tokens))
        return out
