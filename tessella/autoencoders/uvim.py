"""UViM's oracle and base model (arXiv 2205.10337): a label to a short guiding code, code and picture to the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.autoencoders.base import Autoencoder
from tessella.labels.planes import IGNORED, plane_classes
from tessella.transformer import Transformer


class UViM(Autoencoder):
    r"""ViT encoder of label planes, a square code grid, ViT decoder with the picture beside it.

    The one-hot patches of every plane go through one linear layer each and are summed, then the context's patches and
    learned positions are added. The encoder's features are resized to the code grid (bilinear, antialiased) and the
    codes back. The label sees the decoder through the codes alone; code dropout keeps them from saying what the picture
    says.

    ``x [B, P, H, W]`` holds the planes as :mod:`tessella.labels.planes` describes them, and
    ``x_hat [B, sum(planes), H, W]`` the logits (or values) of each in turn, all 0 before training. Depth has
    ``planes = [256]``, panoptic segments ``[1 + categories, instances]``, colour ``[1, 1, 1]``.

    Args:
        planes: classes of each plane; 1 for a plane of values.
        size_px: side of label and picture, a multiple of ``patch_px``.
        patch_px: side of a patch.
        code_grid: side of the code grid.
        width: features of a token, E, a multiple of ``num_heads``.
        encoder_depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        num_heads: attention heads of a block.
        mlp_ratio: hidden features of a block's perceptron as a multiple of ``width``.
        context_channels: of the picture.
        encoder_context: whether the encoder sees the picture.
        decoder_context: whether the decoder does; without both no context is needed.
        drop_codes: in training, set a random number of codes to zero.

    Raises:
        ValueError: a number below 1, or a width or size that does not divide.
    """

    takes_context: ClassVar[bool] = True

    def __init__(
        self,
        *,
        planes: Sequence[int],
        size_px: int = 512,
        patch_px: int = 16,
        code_grid: int = 16,
        width: int = 768,
        encoder_depth: int = 6,
        decoder_depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        context_channels: int = 3,
        encoder_context: bool = True,
        decoder_context: bool = True,
        drop_codes: bool = True,
    ) -> None:
        super().__init__()
        for name, value in {"planes": min(planes, default=0), "size_px": size_px, "patch_px": patch_px,
                            "code_grid": code_grid, "width": width, "encoder_depth": encoder_depth,
                            "decoder_depth": decoder_depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
                            "context_channels": context_channels}.items():  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if size_px % patch_px or width % num_heads:
            raise ValueError(f"size_px must be a multiple of patch_px and width of num_heads, "
                             f"got {size_px}, {patch_px} and {width}, {num_heads}")  # fmt: skip
        self.planes = list(planes)
        self.in_channels = len(planes)
        self.latent_dim = width
        self.stride = size_px
        self.patch_px = patch_px
        self.code_grid = code_grid
        self.context_channels = context_channels
        self.drop_codes = drop_codes
        side = size_px // patch_px
        patch_in = sum(planes) * patch_px**2
        # Rows: plane, class, pixel of the patch. Looked up rather than multiplied: one-hot patches are all but empty.
        self.plane_in = nn.Parameter(torch.randn(patch_in, width) * patch_in**-0.5)
        self.plane_bias = nn.Parameter(torch.zeros(width))
        self.encoder_context = _patches(context_channels, width, patch_px) if encoder_context else None
        self.encoder_positions = nn.Parameter(torch.randn(side**2, width) * width**-0.5)
        self.encoder = _stack(width, encoder_depth, num_heads, mlp_ratio)
        self.decoder_context = _patches(context_channels, width, patch_px) if decoder_context else None
        self.decoder_positions = nn.Parameter(torch.randn(side**2, width) * width**-0.5)
        self.decoder = _stack(width, decoder_depth, num_heads, mlp_ratio)
        self.heads = nn.Linear(width, patch_in)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, P, H, W]`` and the picture ``[B, C, H, W]`` in [-1, 1] to ``[B, code_grid, code_grid, E]``.

        Raises:
            ValueError: x or the picture is of another shape, or the picture is missing.
        """
        expected = [self.in_channels, self.stride, self.stride]
        if x.ndim != 4 or list(x.shape[1:]) != expected:
            raise ValueError(f"x must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        tokens = self._embed_planes(x) + self.encoder_positions
        tokens = self.encoder(self._with_context(tokens, self.encoder_context, context))
        grid = self.stride // self.patch_px
        return _resized(tokens.unflatten(1, (grid, grid)), self.code_grid)

    def decode(self, latent: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, code_grid, code_grid, E]`` and the picture to ``[B, sum(planes), H, W]``.

        Raises:
            ValueError: codes or picture of another shape, or no picture.
        """
        expected = [self.code_grid, self.code_grid, self.latent_dim]
        if latent.ndim != 4 or list(latent.shape[1:]) != expected:
            raise ValueError(f"latent must be [B, {', '.join(map(str, expected))}], got {list(latent.shape)}")
        grid = self.stride // self.patch_px
        tokens = _resized(latent, grid).flatten(1, 2) + self.decoder_positions
        tokens = self.decoder(self._with_context(tokens, self.decoder_context, context))
        patches: Tensor = self.heads(tokens)
        return functional.pixel_shuffle(patches.mT.unflatten(2, (grid, grid)), self.patch_px)

    def code_dropout(self, z_q: Tensor) -> Tensor:
        """In training, zero k codes of each ``z_q [B, h, w, D]``: k uniform in {0 .. h w}, any subset of that size.

        What is left keeps its scale. In evaluation, and without ``drop_codes``, nothing is dropped.
        """
        if not (self.training and self.drop_codes):
            return z_q
        batch_size, num_codes = len(z_q), z_q.shape[1:-1].numel()
        # The k smallest of num_codes uniform numbers are any subset of that size, each as likely as another.
        ranks = torch.rand(batch_size, num_codes, device=z_q.device).argsort(1).argsort(1)
        dropped = ranks < torch.randint(num_codes + 1, (batch_size, 1), device=z_q.device)
        return z_q.masked_fill(dropped.view(*z_q.shape[:-1], 1), 0)

    @property
    def last_layer(self) -> nn.Parameter:
        """See :class:`Autoencoder`."""
        return self.heads.get_parameter("weight")

    def latent_grid(self, *extent: int) -> tuple[int, ...]:
        """See :class:`Autoencoder`; the code grid whatever the extent."""
        return (self.code_grid, self.code_grid)

    def _embed_planes(self, x: Tensor) -> Tensor:
        """``[B, L, E]``: the sum over planes of their (one-hot) patches through a linear layer."""
        pixels = torch.arange(self.patch_px**2, device=x.device)
        # [B, P * p^2, L] -> [B, L, P, p^2]
        patches = functional.unfold(x, self.patch_px, stride=self.patch_px).mT.unflatten(2, (self.in_channels, -1))
        tokens: Tensor = self.plane_bias
        first = 0
        for patch, num_classes in zip(patches.unbind(2), self.planes, strict=True):
            rows = self.plane_in[first : first + num_classes * self.patch_px**2]
            if num_classes == 1:
                tokens = tokens + patch.to(rows.dtype) @ rows
            else:
                classes = plane_classes(patch, num_classes)
                index = classes.clamp(min=0) * self.patch_px**2 + pixels
                says = (classes != IGNORED).to(rows.dtype)
                bags = functional.embedding_bag(
                    index.flatten(0, 1), rows, mode="sum", per_sample_weights=says.flatten(0, 1)
                )
                tokens = tokens + bags.view(*index.shape[:2], -1)
            first += len(rows)
        return tokens

    def _with_context(self, tokens: Tensor, patches: nn.Module | None, context: Tensor | None) -> Tensor:
        if patches is None:
            return tokens
        expected = [len(tokens), self.context_channels, self.stride, self.stride]
        if context is None or list(context.shape) != expected:
            raise ValueError(f"the context must be the picture, {expected}, of the label's size; "
                             f"got {None if context is None else list(context.shape)}")  # fmt: skip
        embedded: Tensor = patches(context)
        return tokens + embedded.flatten(2).mT


def _patches(channels: int, width: int, patch_px: int) -> nn.Module:
    conv = nn.Conv2d(channels, width, patch_px, stride=patch_px)
    nn.init.trunc_normal_(conv.weight, std=(channels * patch_px**2) ** -0.5)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _stack(width: int, depth: int, num_heads: int, mlp_ratio: int) -> Transformer:
    return Transformer(
        width, depth, num_heads, hidden=mlp_ratio * width, norm="layer", activation="gelu_tanh", bias=True, causal=False
    )


def _resized(features: Tensor, side: int) -> Tensor:
    """``[B, side, side, E]`` of ``features [B, h, w, E]``: bilinear, and antialiased where it gets smaller."""
    if features.shape[1:3] == (side, side):
        return features
    # In single precision: torch antialiases nothing less on the CPU.
    resized = functional.interpolate(
        _single(features).movedim(-1, 1), size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.movedim(1, -1).to(features.dtype)


def _single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
