"""One real picture with its measured depth: the stereo pair inside scikit-image's wheel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tessella.data._dense import DepthSamples, Pair
from tessella.data.base import Split
from tessella.data.decode import decode_rgb

# Middlebury 2014, "Motorcycle", at the size scikit-image ships it: focal length and the offset between the two
# cameras' principal points in pixels, and the distance between the cameras.
_FOCAL_PX, _OFFSET_PX, _BASELINE_M = 994.978, 31.086, 0.193001


class Motorcycle(DepthSamples):
    """The motorcycle, as both splits: a picture to look at, not one to learn from.

    Depth is focal length times baseline by disparity and offset; pixels without disparity have none.

    Args:
        split: "train" or "test"; the same.
        size_px: side of the squares in pixels.
        flip: in training, mirror half of the pictures left to right.
        min_area: see :class:`DenseSamples`.
        num_bins: of depth.
        high_m: where the last bin ends, in metres.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        split: Split,
        size_px: int = 64,
        flip: bool = True,
        min_area: float = 1.0,
        num_bins: int = 256,
        high_m: float = 10.0,
    ) -> None:
        super().__init__(split=split, size_px=size_px, flip=flip, min_area=min_area, num_bins=num_bins, high_m=high_m)
        spec = importlib.util.find_spec("skimage")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("scikit-image holds this picture and is not installed: "
                                      "pip install 'tessella[data]'", name="skimage")  # fmt: skip
        self._folder = Path(spec.submodule_search_locations[0]) / "data"

    def __len__(self) -> int:
        """One."""
        return 1

    def sources(self) -> Iterable[Path]:
        """The left view and its disparity."""
        return [self._folder / "motorcycle_left.png", self._folder / "motorcycle_disp.npz"]

    def read(self, index: int) -> Pair:
        """The left view and its depth in metres."""
        with np.load(self._folder / "motorcycle_disp.npz", allow_pickle=False) as stored:
            disparity = stored["arr_0"].astype(np.float64)
        seen = np.isfinite(disparity) & (disparity > 0)
        depth = np.where(seen, _FOCAL_PX * _BASELINE_M / (np.where(seen, disparity, 1) + _OFFSET_PX), 0)
        return Pair(decode_rgb(self._folder / "motorcycle_left.png", "motorcycle"), depth, "motorcycle")
