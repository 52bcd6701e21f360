"""The vision-transformer autoencoder: patches in, patches out, and a latent for each patch or for the whole picture.

The published tokenizers are of these sizes; they differ from each other in details such as learned positions.

================= ==================================================================================================
ViT-VQGAN small   patch_px 8, width 512, depth 8, num_heads 8
ViT-VQGAN base    patch_px 8, width 768, depth 12, num_heads 12
TiTok-S-128       patch_px 16, width 512, depth 8, num_heads 8, num_latents 128, size_px 256
TiTok-B-64        patch_px 16, width 768, depth 12, num_heads 12, num_latents 64, size_px 256
TiTok-L-32        patch_px 16, width 1024, depth 24, num_heads 16, num_latents 32, size_px 256
================= ==================================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessella.autoencoders.base import Autoencoder
from tessella.transformer import Transformer


class ViT(Autoencoder):
    """Transformer encoder and decoder over patches with two-dimensional sine and cosine positions.

    Without ``num_latents`` every patch has its latent (ViT-VQGAN, arXiv 2110.04627), and pictures of any size that is a
    multiple of the patch are taken. With it the encoder appends that many learned queries to the patches and keeps
    them alone, so the latent grid is the sequence (num_latents,); the decoder rebuilds the patches from mask tokens
    beside them (TiTok, arXiv 2406.07550). Such latents stand for a picture of one size: ``stride`` is then ``size_px``.

    Args:
        in_channels: C of the signal.
        patch_px: side of a patch.
        width: features of a token, a multiple of 4 and of ``num_heads``.
        depth: transformer blocks of the encoder, and of the decoder.
        num_heads: attention heads of a block.
        mlp_ratio: hidden features of a block's perceptron as a multiple of ``width``.
        latent_dim: E.
        num_latents: latents of a whole picture; None for one a patch.
        size_px: side of the pictures, a multiple of ``patch_px``; with ``num_latents`` alone.

    Raises:
        ValueError: a number below 1, a width or size that does not divide, ``num_latents`` without ``size_px`` or the
            reverse.
    """

    queries: nn.Parameter
    latent_positions: nn.Parameter
    mask_token: nn.Parameter

    def __init__(
        self,
        *,
        in_channels: int = 3,
        patch_px: int = 8,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: int = 4,
        latent_dim: int = 256,
        num_latents: int | None = None,
        size_px: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"in_channels": in_channels, "patch_px": patch_px, "width": width, "depth": depth,
                            "num_heads": num_heads, "mlp_ratio": mlp_ratio, "latent_dim": latent_dim,
                            "num_latents": num_latents, "size_px": size_px}.items():  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if width % 4 or width % num_heads:
            raise ValueError(f"width must be a multiple of 4 and of num_heads ({num_heads}), got {width}")
        if (num_latents is None) != (size_px is None):
            raise ValueError("num_latents and size_px go together: latents of a whole picture need its size, "
                             f"got num_latents {num_latents} and size_px {size_px}")  # fmt: skip
        if size_px is not None and size_px % patch_px:
            raise ValueError(f"size_px must be a multiple of patch_px ({patch_px}), got {size_px}")
        self.in_channels = in_channels
        self.patch_px = patch_px
        self.latent_dim = latent_dim
        self.num_latents = num_latents
        self.stride = patch_px if size_px is None else size_px
        self.patch_in = nn.Conv2d(in_channels, width, patch_px, stride=patch_px)
        self.encoder = _stack(width, depth, num_heads, mlp_ratio)
        self.to_latent = nn.Linear(width, latent_dim)
        self.from_latent = nn.Linear(latent_dim, width)
        self.decoder = _stack(width, depth, num_heads, mlp_ratio)
        self.patch_out = nn.Linear(width, in_channels * patch_px**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A patch embedding is a linear layer: its fan must not count the kernel twice, as a convolution's does.
        nn.init.xavier_uniform_(self.patch_in.weight.view(width, -1))
        if num_latents is not None:
            self.queries = nn.Parameter(torch.randn(num_latents, width) * width**-0.5)
            self.latent_positions = nn.Parameter(torch.randn(num_latents, width) * width**-0.5)
            self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5)

    def encode(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, H/patch_px, W/patch_px, E]``, or to ``[B, num_latents, E]``.

        Raises:
            ValueError: wrong channels, a side that is no multiple of the patch, or with ``num_latents`` not
                ``size_px``.
        """
        self._check(x)
        patches = self.patch_in(x)
        grid = patches.shape[2:]
        tokens = patches.flatten(2).mT + self._positions(grid)
        if self.num_latents is not None:
            tokens = torch.cat([tokens, self.queries.expand(x.shape[0], -1, -1)], 1)
        latent: Tensor = self.to_latent(self.encoder(tokens))
        return latent.unflatten(1, grid) if self.num_latents is None else latent[:, -self.num_latents :]

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, h, w, E]`` to ``[B, C, h*patch_px, w*patch_px]``, or ``[B, num_latents, E]`` to ``size_px``.

        Raises:
            ValueError: latents of another shape.
        """
        expected = ["B", "h", "w"] if self.num_latents is None else ["B", self.num_latents]
        if latent.ndim != len(expected) + 1 or (self.num_latents is not None and latent.shape[1] != self.num_latents):
            raise ValueError(f"latent must be [{', '.join(map(str, expected))}, {self.latent_dim}], "
                             f"got {list(latent.shape)}")  # fmt: skip
        tokens = self.from_latent(latent)
        if self.num_latents is None:
            grid = latent.shape[1:3]
            tokens = tokens.flatten(1, 2) + self._positions(grid)
        else:
            grid = torch.Size([self.stride // self.patch_px] * 2)
            masks = self.mask_token + self._positions(grid)
            tokens = torch.cat([masks.expand(latent.shape[0], -1, -1), tokens + self.latent_positions], 1)
        patches: Tensor = self.patch_out(self.decoder(tokens)[:, : grid.numel()])
        return F.pixel_shuffle(patches.mT.unflatten(2, grid), self.patch_px)

    @property
    def last_layer(self) -> nn.Parameter:
        """See :class:`Autoencoder`."""
        return self.patch_out.get_parameter("weight")

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """See :class:`Autoencoder`; (num_latents,) for every picture where there are such."""
        return super().latent_grid(*extent) if self.num_latents is None else (self.num_latents,)

    def _positions(self, grid: torch.Size) -> Tensor:
        weight = self.patch_in.weight  # its dtype also under autocast: coarse numbers would blur positions
        return sincos_positions(grid[0], grid[1], len(weight), like=weight)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, H, W], got {list(x.shape)}")
        height, width = x.shape[-2:]
        if self.num_latents is not None and (height, width) != (self.stride, self.stride):
            raise ValueError(f"with num_latents x must be of the size {self.stride} x {self.stride}, got "
                             f"{height} x {width}; crop the pictures, or let Tokenizer.encode pad smaller ones "
                             "(pad=True)")  # fmt: skip
        if height % self.patch_px or width % self.patch_px or not (height and width):
            raise ValueError(
                f"the sides of x must be multiples of the patch {self.patch_px}, got {height} x {width}; "
                "crop the pictures, or let Tokenizer.encode pad them (pad=True)"
            )


def _stack(width: int, depth: int, num_heads: int, mlp_ratio: int) -> Transformer:
    return Transformer(
        width, depth, num_heads, hidden=mlp_ratio * width, norm="layer", activation="gelu", bias=True, causal=False
    )


def sincos_positions(height: int, width: int, dim: int, *, like: Tensor) -> Tensor:
    """``[height * width, dim]``, row-major: the row in the first half of the features, the column in the second.

    Each half holds sin(p f) and then cos(p f) at the dim / 4 frequencies f = 10000^(-4i / dim). Device and dtype are
    those of ``like``.
    """
    frequencies = 10_000.0 ** (torch.arange(dim // 4, device=like.device) / -(dim // 4))
    halves = [torch.arange(size, device=like.device)[:, None] * frequencies for size in (height, width)]
    rows, columns = (torch.cat([angle.sin(), angle.cos()], -1).to(like.dtype) for angle in halves)
    grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(grid, -1).flatten(0, 1)
