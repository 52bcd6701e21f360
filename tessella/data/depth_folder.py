"""Folders of pictures with depth maps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tessella.data._dense import Array, DepthSamples, Pair, read_plane, require_folder
from tessella.data._errors import DataError, UnreadableImage
from tessella.data._splits import TRAIN_NAME, check_share, find_test_name, held_out_part
from tessella.data.base import Split
from tessella.data.decode import decode_rgb, picture_extensions


class DepthFolder(DepthSamples):
    """``images/NAME.*`` with ``depth/NAME.png`` (8 or 16 bits) or ``depth/NAME.npy``.

    Where the folder holds ``train/`` and ``test/`` (or ``val/``), these are the splits, and both folders lie inside.
    Else a share is held out, picked by a hash of the name.

    Args:
        path: the folder.
        split: "train" or "test".
        size_px: side of the squares in pixels.
        flip: in training, mirror half of the pictures left to right.
        min_area: see :class:`DenseSamples`.
        num_bins: of depth.
        high_m: where the last bin ends, in metres.
        units_per_m: what a metre is in the PNGs: 1000 where they count millimetres.
        array_units_per_m: the same of the .npy files.
        held_out: the share held out where the folder itself does not separate.

    Raises:
        ValueError: no such folders, a picture without depth, or an argument out of its range.
    """

    carries = DepthSamples.carries | {"units_per_m", "array_units_per_m"}

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
        units_per_m: float = 1000.0,
        array_units_per_m: float = 1.0,
        held_out: float = 0.05,
    ) -> None:
        super().__init__(split=split, size_px=size_px, flip=flip, min_area=min_area, num_bins=num_bins, high_m=high_m)
        check_share(held_out)
        for name, value in (("units_per_m", units_per_m), ("array_units_per_m", array_units_per_m)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self._units = {".png": units_per_m, ".npy": array_units_per_m}
        root = require_folder(Path(path), "images/ and depth/, or train/ and test/ that do")
        children = {child.name for child in root.iterdir() if child.is_dir()}
        test_name = find_test_name(children)
        if test_name is not None:
            root = root / (TRAIN_NAME if split == "train" else test_name)
        images = require_folder(root / "images", "pictures")
        self._depth = require_folder(root / "depth", "depth maps")
        files = sorted(file for file in images.iterdir() if file.suffix.lower() in picture_extensions())
        if not files:
            raise DataError(f"no picture in {images}")
        if missing := [file.name for file in files if self._map(file) is None]:
            raise DataError(f"{len(missing)} pictures of {images} have no depth in {self._depth}, such as {missing[0]}")
        names = [file.name for file in files]
        kept = range(len(files)) if test_name is not None else held_out_part(names, split, held_out)
        self._files = [files[i] for i in kept]

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._files)

    def sources(self) -> Iterable[Path]:
        """Pictures and depth maps."""
        return [*self._files, *filter(None, map(self._map, self._files))]

    def read(self, index: int) -> Pair:
        """The picture and its depth in metres."""
        image = self._files[index]
        file = self._map(image)
        assert file is not None
        depth = read_plane(file, image.name) if file.suffix == ".png" else _read_array(file, image.name)
        return Pair(decode_rgb(image, image.name), depth / self._units[file.suffix], image.name)

    def _map(self, image: Path) -> Path | None:
        candidates = (self._depth / f"{image.stem}{suffix}" for suffix in self._units)
        return next((file for file in candidates if file.is_file()), None)


def _read_array(file: Path, key: str) -> Array:
    try:
        depth: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UnreadableImage(key, f"depth {file.name} cannot be read: {error}") from error
    if depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise UnreadableImage(key, f"depth {file.name} must be numbers [H, W], got {depth.dtype} {list(depth.shape)}")
    return depth
