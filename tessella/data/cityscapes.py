"""Cityscapes and folders laid out like it: street scenes with instance maps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tessella.data._dense import Pair, PanopticSamples, arguments_of, read_plane, require_folder
from tessella.data._errors import DataError, UnreadableImage
from tessella.data.base import Split
from tessella.data.decode import decode_rgb
from tessella.registry import Spec

# Number in the files -> name, of the nineteen classes that are evaluated. All other numbers are void.
_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
_LARGEST_NUMBER = 33


class Cityscapes(PanopticSamples):
    """``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` with ``gtFine/SPLIT/CITY/*_gtFine_instanceIds.png``.

    A pixel of the 16-bit instance map is 1000 class + n for the n-th instance, else its class alone. Things without a
    number are groups that nobody told apart: they are not learned (-1).

    Args:
        path: the folder that holds leftImg8bit/ and gtFine/.
        split: "train", or "test" for val/, whose labels are public.
        size_px: side of the squares in pixels.
        flip: in training, mirror half of the pictures left to right.
        min_area: see :class:`DenseSamples`.
        num_instances: numbers of the instance plane, 0 included.

    Raises:
        ValueError: no such folders, a picture without a label, or an argument out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: Split,
        size_px: int = 512,
        flip: bool = True,
        min_area: float = 0.05,
        num_instances: int = 100,
    ) -> None:
        super().__init__(
            split=split, size_px=size_px, flip=flip, min_area=min_area, class_names=list(_CLASSES.values()),
            things=_THINGS, num_instances=num_instances,
        )  # fmt: skip
        name = {"train": "train", "test": "val"}[split]
        self._images = require_folder(Path(path) / "leftImg8bit" / name, "a folder of pictures for each city")
        self._labels = require_folder(Path(path) / "gtFine" / name, "a folder of labels for each city")
        self._files = sorted(self._images.glob("*/*_leftImg8bit.png"))
        if not self._files:
            raise DataError(f"no file */*_leftImg8bit.png in {self._images}")
        if missing := [f.name for f in self._files if not self._label(f).is_file()]:
            raise DataError(f"{len(missing)} pictures of {self._images} have no label in {self._labels}, "
                            f"such as {missing[0]}")  # fmt: skip
        self._categories = {number: category for category, number in enumerate(_CLASSES)}
        self._thing_numbers = [number for number, one in _CLASSES.items() if one in _THINGS]

    @classmethod
    def medium_spec(cls, section: Spec) -> Spec:
        """See :class:`Samples`."""
        told = {"class_names": list(_CLASSES.values()), "things": list(_THINGS)}
        return {"name": cls.medium, **told, **arguments_of(cls, section, "num_instances")}

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._files)

    def sources(self) -> Iterable[Path]:
        """Pictures and instance maps."""
        return [*self._files, *map(self._label, self._files)]

    def read(self, index: int) -> Pair:
        """The picture and its instance map, 0 for void and -1 for groups of things."""
        file = self._files[index]
        key = f"{file.parent.name}/{file.name.removesuffix('_leftImg8bit.png')}"
        label = read_plane(self._label(file), key)
        numbers = np.where(label >= 1000, label // 1000, label)
        if numbers.max() > _LARGEST_NUMBER:
            raise UnreadableImage(key, f"instance map holds class number {numbers.max()}; the largest is "
                                       f"{_LARGEST_NUMBER}")  # fmt: skip
        ids = np.where(np.isin(numbers, list(_CLASSES)), label, 0)
        return Pair(decode_rgb(file, key), np.where(np.isin(label, self._thing_numbers), -1, ids), key)

    def categories(self, ids: list[int], key: str) -> dict[int, int]:
        """See :class:`PanopticSamples`."""
        return {i: self._categories[i // 1000 if i >= 1000 else i] for i in ids}

    def _label(self, image: Path) -> Path:
        stem = image.name.removesuffix("_leftImg8bit.png")
        return self._labels / image.parent.name / f"{stem}_gtFine_instanceIds.png"
