"""Ten colour photographs from inside the wheels of scikit-image and scikit-learn: real pictures without a download."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tessella.data._pixels import MODES
from tessella.data.base import ImageDataset, Picture, Sample, Split, random_for
from tessella.data.decode import decode_rgb

# Class name -> package and the file in it. Of the motorcycle's stereo pair only the left view: both show one scene.
_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "immunohistochemistry": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}

# The held-out band, in shares of the width: beside the middle, so that both sides of it hold some of the subject.
_BAND = (0.4, 0.7)


class _Box(NamedTuple):
    """Pixels [left, right) x [top, bottom) of a photograph."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def fits(self, size: int) -> bool:
        return min(self.width, self.height) >= size


class Photos(ImageDataset):
    """Square crops of ten photographs; each photograph is a class.

    A vertical band of every photograph, 30 % of its width, is held out. Training crops are random crops of what lies
    left and right of the band; test crops tile the band without overlap. The pixels of the two splits are disjoint,
    whatever the crop. Both are balanced: index i shows photograph i mod 10, and test takes from every band as many
    tiles, evenly spread, as the smallest band has. The largest crop is 136 px, the width of the smallest band.

    Args:
        split: "train" or "test".
        crop_px: side of the crop in pixels.
        flip: in training, mirror half of the crops left to right.
        crops_per_epoch: number of training crops that count as an epoch; no part in the test split.
        channels: 3 RGB, 1 grey (ITU-R 601-2), or 4 RGBA, opaque.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
        ValueError: ``crop_px`` does not fit into the photographs, or channels that they do not have.
    """

    carries = frozenset({"crop_px", "flip", "channels"})
    window = frozenset()

    def __init__(
        self, *, split: Split, crop_px: int = 64, flip: bool = False, crops_per_epoch: int = 10_000, channels: int = 3
    ) -> None:
        super().__init__(split=split, crop_px=crop_px, flip=flip, channels=channels)
        if channels not in MODES:
            raise ValueError(f"the photographs can be had with 1, 3 or 4 channels, not with {channels}")
        if crops_per_epoch < 1:
            raise ValueError(f"crops_per_epoch must be at least 1, got {crops_per_epoch}")
        self.class_names = tuple(_FILES)
        self.crops_per_epoch = crops_per_epoch
        boxes = held_out_boxes if split == "test" else training_boxes
        self._boxes = [[box for box in boxes(name) if box.fits(crop_px)] for name in self.class_names]
        for name, fitting in zip(self.class_names, self._boxes, strict=True):
            if not fitting:
                largest = max(min(box.width, box.height) for box in boxes(name))
                raise ValueError(f"crop_px={crop_px} does not fit into photograph {name!r}, at most {largest} does")
        if split == "test":
            tiles = [_tiles(box, crop_px) for (box,) in self._boxes]
            self._tiles_per_photograph = min(map(len, tiles))
            self._boxes = [_spread(of_one, self._tiles_per_photograph) for of_one in tiles]

    def __len__(self) -> int:
        """The number of crops in an epoch."""
        return len(self.class_names) * self._tiles_per_photograph if self.split == "test" else self.crops_per_epoch

    def read(self, index: int) -> Picture:
        """In test a tile; in training all of one side of the band, which :meth:`sample` crops."""
        turn, label = divmod(index, len(self.class_names))
        name = self.class_names[label]
        boxes = self._boxes[label]
        if self.split == "test":
            box = boxes[turn]
        else:  # the sides in proportion to their widths, fixed by the index
            widths = np.array([box.width for box in boxes])
            box = boxes[random_for(0, 0, index).choice(len(boxes), p=widths / widths.sum())]
        pixels = _photograph(name)[box.top : box.bottom, box.left : box.right]
        # As they are the pixels are cropped without a copy of all of them.
        picture = pixels if self.channels == 3 else Image.fromarray(pixels).convert(MODES[self.channels])
        return Picture(picture, label, f"{name}:{index}")

    def sources(self) -> Iterable[Path]:
        """The photographs."""
        return map(_file, self.class_names)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """As everywhere, save that training crops without ``rng`` are random ones too, fixed by the index."""
        return super().sample(index, random_for(0, 0, index) if rng is None and self.split == "train" else rng)


def held_out_boxes(name: str) -> list[_Box]:
    """The one band of photograph ``name`` that training never sees."""
    width, height = _size(name)
    left, right = (round(share * width) for share in _BAND)
    return [_Box(left, 0, right, height)]


def training_boxes(name: str) -> list[_Box]:
    """What lies left and right of that band."""
    width, height = _size(name)
    (band,) = held_out_boxes(name)
    return [_Box(0, 0, band.left, height), _Box(band.right, 0, width, height)]


def _tiles(box: _Box, size: int) -> list[_Box]:
    """The squares of a grid centred in ``box``, row by row."""
    columns, rows = box.width // size, box.height // size
    left, top = box.left + (box.width - columns * size) // 2, box.top + (box.height - rows * size) // 2
    corners = [(left + column * size, top + row * size) for row in range(rows) for column in range(columns)]
    return [_Box(x, y, x + size, y + size) for x, y in corners]


def _spread(tiles: list[_Box], count: int) -> list[_Box]:
    """``count`` of the tiles at even steps."""
    return [tiles[position * len(tiles) // count] for position in range(count)]


def _size(name: str) -> tuple[int, int]:
    height, width, _ = _photograph(name).shape
    return width, height


@cache
def _photograph(name: str) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """``[H, W, 3]``, decoded once a process."""
    return np.asarray(decode_rgb(_file(name), name))


def _file(name: str) -> Path:
    package, file = _FILES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the photographs come with scikit-image and scikit-learn, and {package} is not installed: "
            "pip install 'tessella[data]'",
            name=package,
        )
    return Path(spec.submodule_search_locations[0]) / file
