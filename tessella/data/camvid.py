"""CamVid-like folders of street scenes: pictures, and masks of class numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tessella.data._dense import Array, Pair, PanopticSamples, read_plane, require_folder
from tessella.data._errors import DataError, UnreadableImage
from tessella.data._splits import TRAIN_NAME, find_test_name
from tessella.data.base import Split
from tessella.data.decode import decode_rgb, picture_extensions
from tessella.extras import require

_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
_THINGS = ("pole", "sign", "car", "pedestrian", "bicyclist")


class CamVid(PanopticSamples):
    """``{train,test,val}/images/NAME.jpg`` with ``{train,test,val}/masks/NAME.png``, whose pixels are class numbers.

    The first class is number 0; numbers from the number of classes on, and 255, are void. The masks know no instances:
    a segment of a thing is a connected component of its class (sides touching) in the whole picture, a segment of stuff
    all of its class. Components of less than ``min_segment_px`` pixels of the whole picture are not learned (-1).

    Args:
        path: the folder.
        split: "train" or "test"; test is the first of test/, val/, valid/, validation/ there is.
        size_px: side of the squares in pixels.
        flip: in training, mirror half of the pictures left to right.
        min_area: see :class:`DenseSamples`.
        num_instances: numbers of the instance plane, 0 included.
        min_segment_px: see above.
        class_names: of the numbers from 0 on.
        things: names of those that are things.

    Raises:
        ValueError: no such folders, a picture without a mask, or an argument out of its range.
    """

    carries = PanopticSamples.carries | {"min_segment_px", "class_names", "things"}

    def __init__(
        self,
        path: str | Path,
        *,
        split: Split,
        size_px: int = 64,
        flip: bool = True,
        min_area: float = 0.05,
        num_instances: int = 100,
        min_segment_px: int = 20,
        class_names: Sequence[str] = _CLASSES,
        things: Sequence[str] = _THINGS,
    ) -> None:
        super().__init__(
            split=split, size_px=size_px, flip=flip, min_area=min_area, class_names=class_names, things=things,
            num_instances=num_instances,
        )  # fmt: skip
        self.min_segment_px = min_segment_px
        root = require_folder(Path(path), "train/ and test/")
        name = TRAIN_NAME if split == "train" else find_test_name({child.name for child in root.iterdir()})
        if name is None:
            raise DataError(f"path {str(path)!r} holds no test/, val/, valid/ or validation/ for split 'test'")
        self._images = require_folder(root / name / "images", "pictures")
        self._masks = require_folder(root / name / "masks", "masks of class numbers")
        self._prefix = name
        self._files = sorted(f for f in self._images.iterdir() if f.suffix.lower() in picture_extensions())
        if not self._files:
            raise DataError(f"no picture in {self._images}")
        if missing := [f.name for f in self._files if not self._mask(f).is_file()]:
            raise DataError(f"{len(missing)} pictures of {self._images} have no mask in {self._masks}, "
                            f"such as {missing[0]}")  # fmt: skip
        self._thing_numbers = [i for i, one in enumerate(self.class_names) if one in self.things]

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._files)

    def sources(self) -> Iterable[Path]:
        """Pictures and masks."""
        return [*self._files, *map(self._mask, self._files)]

    def read(self, index: int) -> Pair:
        """The picture, and the ids of its segments: 1 + class for stuff, 1000 (1 + class) + n for the n-th thing."""
        file = self._files[index]
        key = f"{self._prefix}/{file.stem}"
        mask = read_plane(self._mask(file), key)
        if beyond := sorted(set(np.unique(mask).tolist()) - {*range(len(self.class_names) + 1), 255}):
            raise UnreadableImage(key, f"mask {file.stem}.png holds class numbers {beyond[:5]}; accepted are 0 .. "
                                       f"{len(self.class_names)} and 255")  # fmt: skip
        ids = np.where(mask < len(self.class_names), mask + 1, 0)
        for number in self._thing_numbers:
            components = _components(mask == number)
            sizes = np.bincount(components.ravel())
            ids = np.where(components > 0, 1000 * (number + 1) + components, ids)
            ids = np.where((components > 0) & (sizes[components] < self.min_segment_px), -1, ids)
        return Pair(decode_rgb(file, key), ids, key)

    def categories(self, ids: list[int], key: str) -> dict[int, int]:
        """See :class:`PanopticSamples`."""
        return {i: (i // 1000 or i) - 1 for i in ids}

    def _mask(self, image: Path) -> Path:
        return self._masks / f"{image.stem}.png"


def _components(mask: Array) -> Array:
    """Connected components of a mask, sides touching: 0 outside, numbered from 1."""
    if not mask.any():
        return np.zeros(mask.shape, np.int64)
    numbered: Array = require("skimage.measure", extra="data").label(mask, connectivity=1)
    return numbered
