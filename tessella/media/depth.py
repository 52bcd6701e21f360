"""Depth maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessella.data._dense import read_plane
from tessella.data._errors import DataError
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics
from tessella.evaluation.dense_records import DepthMetrics
from tessella.labels.depth import DepthBins, checked_depth
from tessella.media._dense import DenseMedium, beside, nearest, scale
from tessella.reporting.pictures import Array, oklab_to_rgb, png
from tessella.storage import write_bytes

UNITS_PER_M = 1000

_NUM_COLOURS = 256


class Depth(DenseMedium):
    """Depth ``x [1, H, W]`` as bins (:class:`tessella.labels.depth.DepthBins`), in files as 16-bit PNG of millimetres.

    Pixels without a depth are 0 in files and black in pictures, where near is bright and warm, far dark and cold.

    Args:
        num_bins: of depth.
        high_m: where the last bin ends, in metres.
    """

    def __init__(self, *, num_bins: int = 256, high_m: float = 10.0) -> None:
        self.bins = DepthBins(num_bins, high_m=high_m)

    def metres(self, x: Tensor) -> Tensor:
        """``[..., H, W]`` in metres, 0 where there is none, of planes ``[..., 1, H, W]`` or logits.

        Raises:
            ValueError: another number of channels.
        """
        channels = x.shape[-3]
        if channels not in (1, self.bins.num_bins):
            raise ValueError(f"depth has 1 channel, or {self.bins.num_bins} of logits, got {channels}")
        if channels == 1:
            return self.bins.to_metres(x.squeeze(-3))
        return self.bins.class_metres(x.argmax(-3))

    def read(self, path: Path) -> Tensor:
        """A 16-bit PNG of millimetres."""
        try:
            return self.bins.to_plane(checked_depth(read_plane(path, str(path)) / UNITS_PER_M, str(path)))[None]
        except ValueError as error:
            raise error if isinstance(error, DataError) else DataError(str(error)) from error

    def write(self, x: Tensor, path: Path) -> None:
        """Rounded to millimetres."""
        levels = (self.metres(x.detach().cpu()).double() * UNITS_PER_M).round().clamp(0, 2**16 - 1)
        write_bytes(path, png(levels.numpy().astype(np.uint16)))

    def metrics(self, *, weights: Path | None = None, **options: Any) -> Metrics:
        """RMSE, abs-rel, log10 and the three deltas; there are no options."""
        if rest := {name: value for name, value in options.items() if value is not None}:
            raise ConfigError(f"the metrics of depth have no options, got {', '.join(rest)}")
        return DepthMetrics(self.bins)

    def pictures(self, x: Tensor) -> list[Array]:
        """See the class."""
        metres = self.metres(x.detach().float().cpu())
        colours = depth_colours(_NUM_COLOURS)
        share = (metres / self.bins.high_m).clamp(0, 1)
        shown = torch.from_numpy(colours)[(share * (_NUM_COLOURS - 1)).round().long()]
        shown[metres <= 0] = 0
        return list(shown.numpy())

    def annotated(self, x: Tensor) -> Array:
        """With a scale in metres."""
        picture = self.pictures(x[None])[0]
        high = self.bins.high_m
        marks = {share: f"{share * high:g} m" for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
        return beside(picture, scale(depth_colours(_NUM_COLOURS), max(len(picture), 128), marks))

    def resized(self, x: Tensor, height: int, width: int) -> Tensor:
        """See :class:`DenseMedium`."""
        return nearest(self.bins.to_plane(self.metres(x.cpu()))[None], height, width)


def depth_colours(count: int) -> Array:
    """``[count, 3]`` from near to far: lightness falls evenly, the hue turns from yellow over red to blue."""
    share = torch.linspace(0, 1, count)
    hue = torch.deg2rad(100 - 200 * share)
    chroma = 0.13 * torch.ones(count)
    lab = torch.stack([0.93 - 0.65 * share, chroma * hue.cos(), chroma * hue.sin()], -1)
    return oklab_to_rgb(lab).numpy()
