"""Depth in bins (UViM, arXiv 2205.10337)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessella.labels.planes import plane_classes

# No camera of these data sets sees so far; sixteen-bit files count millimetres.
_FARTHEST_M = 1000.0

NO_DEPTH = 0  # the bin of pixels without one


@dataclass(frozen=True)
class DepthBins:
    r"""Depth as a plane that counts bins, and as bins.

    .. math:: x = \frac{d - d_0}{d_1 - d_0} n, \quad k = clip(\lfloor x \rfloor, 0, n - 1), \quad
              \hat d = \frac{k + 1/2}{n} (d_1 - d_0) + d_0

    Args:
        num_bins: n. Bin 0 also holds the pixels without a depth; it is not learned.
        low_m: d_0; a depth up to it is none.
        high_m: d_1; a depth from it on falls into the last bin.

    Raises:
        ValueError: fewer than 2 bins, or no range.
    """

    num_bins: int = 256
    low_m: float = 1e-3
    high_m: float = 10.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {self.num_bins}")
        if not 0 <= self.low_m < self.high_m:
            raise ValueError(f"low_m and high_m must be a range of depths, got {self.low_m} and {self.high_m}")

    @property
    def _range_m(self) -> float:
        return self.high_m - self.low_m

    def to_plane(self, depth_m: Tensor) -> Tensor:
        """x, at least 0, of ``depth_m [...]``; 0 where there is no depth."""
        # In double precision, so that the way back gives the same float32 numbers.
        plane = (depth_m.double() - self.low_m) / self._range_m * self.num_bins
        return plane.clamp(min=0).float()

    def to_metres(self, plane: Tensor) -> Tensor:
        """d of a plane, to float32's precision; 0 where there is none (x <= 0)."""
        metres = plane.double() / self.num_bins * self._range_m + self.low_m
        return metres.masked_fill(plane <= 0, 0).float()

    def classes(self, plane: Tensor) -> Tensor:
        """k (int64) of a plane."""
        return plane_classes(plane, self.num_bins).clamp(min=0)

    def class_metres(self, classes: Tensor) -> Tensor:
        """The middle of each bin."""
        return (classes + 0.5) / self.num_bins * self._range_m + self.low_m

    def from_logits(self, logits: Tensor) -> Tensor:
        """The middle of the likeliest bin, in metres ``[B, *X]``, of ``logits [B, n, *X]``."""
        return self.class_metres(logits.argmax(1))

    def valid(self, depth_m: Tensor) -> Tensor:
        """Where a true depth counts: strictly inside the range."""
        return (depth_m > self.low_m) & (depth_m < self.high_m)


def checked_depth(depth: np.ndarray[Any, Any], name: str) -> Tensor:
    """Depth ``[H, W]`` in metres as float32; holes (0, negative, infinite, NaN) become 0.

    Raises:
        ValueError: not a single plane, or numbers that cannot be metres; ``name`` is in the message.
    """
    if depth.ndim != 2:
        raise ValueError(f"{name}: depth must be one plane [H, W], got {list(depth.shape)}; a colour picture of depth "
                         "has no scale to read it by")  # fmt: skip
    metres = torch.from_numpy(np.ascontiguousarray(depth, dtype=np.float32))
    metres = torch.where(metres.isfinite() & (metres > 0), metres, torch.zeros(()))
    farthest = metres.max().item() if metres.numel() else 0.0
    if farthest > _FARTHEST_M:
        raise ValueError(f"{name}: depths up to {farthest:g} m; that looks like millimetres: say how many units make a "
                         "metre (units_per_m = 1000)")  # fmt: skip
    return metres
