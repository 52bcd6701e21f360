"""TiTok's first models (arXiv 2406.07550): the decoder names codes of MaskGIT's tokenizer, whose decoder paints them.

The encoder of these weights was trained on a slip: its features were laid out anew, not transposed, before the last
layer, so that a latent token mixes features of several. It is part of what they learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.autoencoders.maskgit_vqgan import MaskGITVQGAN
from tessella.autoencoders.titok import TiTok


class TiTokProxy(TiTok):
    """:class:`TiTok` that decodes to a mixture of ``num_proxies`` codes at each patch, and these by a VQGAN.

    Args:
        num_proxies: codes of the VQGAN.
        proxy_dim: their dimensions.
        proxy_channels: width of the VQGAN's first level.
        size_px, patch_px, num_latents, latent_dim, encoder_width, encoder_depth, encoder_heads, decoder_width,
            decoder_depth, decoder_heads: see :class:`TiTok`; the patch is 16, the VQGAN's stride.
    """

    def __init__(
        self,
        *,
        num_proxies: int = 1024,
        proxy_dim: int = 256,
        proxy_channels: int = 128,
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
        self.num_proxies, self.proxy_dim, self.proxy_channels = num_proxies, proxy_dim, proxy_channels
        super().__init__(
            size_px=size_px, patch_px=patch_px, num_latents=num_latents, latent_dim=latent_dim,
            encoder_width=encoder_width, encoder_depth=encoder_depth, encoder_heads=encoder_heads,
            decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=decoder_heads,
        )  # fmt: skip

    def build_head(self, width: int) -> None:
        """See :meth:`TiTok.build_head`."""
        self.logits = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, self.num_proxies))
        self.proxies = nn.Parameter(torch.randn(self.num_proxies, self.proxy_dim) * self.proxy_dim**-0.5)
        vqgan = MaskGITVQGAN(channels=self.proxy_channels, latent_dim=self.proxy_dim)
        if vqgan.stride != self.patch_px:
            raise ValueError(f"patch_px must be {vqgan.stride}, got {self.patch_px}")
        self.painter = vqgan.decoder

    def arrange(self, tokens: Tensor) -> Tensor:
        """See :meth:`TiTok.arrange`: the numbers of a sample in another shape, not the transpose."""
        return tokens.reshape(tokens.shape[0], tokens.shape[2], tokens.shape[1]).mT

    def picture(self, tokens: Tensor) -> Tensor:
        """See :meth:`TiTok.picture`."""
        mixed = self.logits(tokens).softmax(-1) @ self.proxies
        out: Tensor = self.painter(mixed.mT.unflatten(2, (self.grid, self.grid)))
        return out

    @property
    def last_layer(self) -> nn.Parameter:
        """See :class:`Autoencoder`."""
        return self.painter.conv_out.get_parameter("weight")
