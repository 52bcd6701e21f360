"""Colours of grey pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.evaluation.base import Metrics
from tessella.evaluation.features import FeatureNetwork
from tessella.labels.color import to_grey
from tessella.media._dense import DenseMedium
from tessella.media.image import Image
from tessella.reporting.pictures import Array, to_pictures


class Color(DenseMedium):
    """Pictures ``x [3, H, W]`` in [-1, 1] whose context is their own luma; files and numbers are those of pictures."""

    def __init__(self) -> None:
        self._image = Image()

    def context(self, picture: Tensor) -> Tensor:
        """Its luma three times over; a grey picture itself."""
        return to_grey(picture)

    def read(self, path: Path) -> Tensor:
        """A picture file in any format that data sets read."""
        return self._image.read(path)

    def write(self, x: Tensor, path: Path) -> None:
        """Clamped to [-1, 1] and rounded to 8 bits."""
        self._image.write(x, path)

    def metrics(self, *, weights: Path | None = None, **options: Any) -> Metrics:
        """PSNR and SSIM, and LPIPS with ``weights``; the options are those of pictures."""
        return self._image.metrics(weights=weights, **options)

    def feature_network(self, protocol: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
        """See :class:`tessella.media.image.Image`."""
        return self._image.feature_network(protocol, weights, device)

    def pictures(self, x: Tensor) -> list[Array]:
        """Themselves."""
        return to_pictures(x)

    def annotated(self, x: Tensor) -> Array:
        """Itself: a picture needs no legend."""
        return to_pictures(x[None])[0]

    def resized(self, x: Tensor, height: int, width: int) -> Tensor:
        """Bilinear, antialiased."""
        return torch.nn.functional.interpolate(
            x[None].float().cpu(), (height, width), mode="bilinear", align_corners=False, antialias=True
        )[0].clamp(-1, 1)
