"""NYU Depth v2: the labelled .mat file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessella.data._dense import DepthSamples, Pair
from tessella.data._errors import DataError, UnreadableImage
from tessella.data._splits import check_share, held_out_part
from tessella.data.base import Sample, Split
from tessella.extras import require

# The usual part of a 480 x 640 frame, without its white border: rows 54 to 480, columns 41 to 601.
_FULL = (480, 640)
_CROP = (slice(54, 480), slice(41, 601))


class NYUDepth(DepthSamples):
    """The pictures and filled-in depths of ``nyu_depth_v2_labeled.mat`` (MATLAB 7.3, that is HDF5).

    The file holds ``images [N, 3, W, H]`` of bytes and ``depths [N, W, H]`` in metres, columns first as MATLAB writes
    them. Frames of 480 x 640 are cropped as usual to rows 54:480 and columns 41:601. The official split is a file of
    its own, ``splits.mat``; without it a share of the frames is held out, picked by a hash of their number.

    Args:
        path: the .mat file.
        split: "train" or "test".
        size_px: side of the squares in pixels.
        flip: in training, mirror half of the pictures left to right.
        min_area: see :class:`DenseSamples`.
        num_bins: of depth.
        high_m: where the last bin ends, in metres.
        splits: the file with ``trainNdxs`` and ``testNdxs``, numbers from 1.
        held_out: the share held out where there is no such file.

    Raises:
        ImportError: h5py is not installed (or scipy, with ``splits``).
        ValueError: no such file, one of another layout, or an argument out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: Split,
        size_px: int = 512,
        flip: bool = True,
        min_area: float = 0.05,
        num_bins: int = 256,
        high_m: float = 10.0,
        splits: str | None = None,
        held_out: float = 0.45,
    ) -> None:
        super().__init__(split=split, size_px=size_px, flip=flip, min_area=min_area, num_bins=num_bins, high_m=high_m)
        check_share(held_out)
        self.path = Path(path)
        with self._open() as file:
            shapes = {name: file[name].shape if name in file else None for name in ("images", "depths")}
        images, depths = shapes["images"], shapes["depths"]
        if images is None or depths is None or len(images) != 4 or len(depths) != 3:
            raise DataError(
                f"{self.path} must hold images [N, 3, W, H] and depths [N, W, H], got {images} and {depths}"
            )
        if images != (depths[0], 3, *depths[1:]):
            raise DataError(f"{self.path}: images {images} and depths {depths} are of different numbers or sizes")
        number = depths[0]
        if splits is None:
            self._frames = held_out_part([str(i) for i in range(number)], split, held_out)
        else:
            self._frames = _official(Path(splits), split, number)
        self._file: Any = None

    def __len__(self) -> int:
        """The number of frames."""
        return len(self._frames)

    def sources(self) -> Iterable[Path]:
        """The one file."""
        return [self.path]

    def read(self, index: int) -> Pair:
        """The frame and its depth in metres."""
        if self._file is None:
            self._file = self._open()
        frame = self._frames[index]
        key = f"frame {frame + 1}"
        try:
            image = np.asarray(self._file["images"][frame]).transpose(2, 1, 0)
            depth = np.asarray(self._file["depths"][frame]).T
        except OSError as error:
            raise UnreadableImage(key, str(error)) from error
        if depth.shape == _FULL:
            image, depth = image[_CROP], depth[_CROP]
        return Pair(Image.fromarray(np.ascontiguousarray(image)), depth, key)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """As everywhere; without ``rng`` also ``depth_m [H, W]``, the depth at its own size, which is scored."""
        sample = super().sample(index, rng)
        if rng is None:
            cast(dict[str, Tensor], sample)["depth_m"] = torch.from_numpy(self.read(index).label.astype(np.float32))
        return sample

    def _open(self) -> Any:
        h5py = require("h5py", extra="data")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read as HDF5 (a MATLAB 7.3 file): {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: a worker process opens it itself."""
        return {**self.__dict__, "_file": None}


def _official(path: Path, split: Split, number: int) -> list[int]:
    loadmat = require("scipy.io", extra="eval").loadmat
    try:
        content = loadmat(path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"splits {path} cannot be read: {error}") from error
    name = f"{split}Ndxs"
    if name not in content:
        raise DataError(f"splits {path} holds no {name}")
    frames: list[int] = (content[name].astype(np.int64).ravel() - 1).tolist()
    if not frames or min(frames) < 0 or max(frames) >= number:
        raise DataError(f"splits {path}: {name} must hold numbers from 1 to {number}")
    return frames
