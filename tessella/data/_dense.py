"""Pictures with a label for every pixel: read, cropped and resized together."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tessella.data._errors import DataError, UnreadableImage
from tessella.data.base import UNKNOWN_LABEL, Sample, Samples, Split, to_tensor
from tessella.labels.depth import DepthBins, checked_depth
from tessella.labels.panoptic import PanopticPlanes, Segments
from tessella.registry import Spec

Box = tuple[int, int, int, int]  # left, top, right, bottom
Array = np.ndarray[Any, Any]

_CROP_TRIES = 10
_MIN_ASPECT, _MAX_ASPECT = 0.75, 4 / 3


class Pair(NamedTuple):
    """What a data set reads: an RGB picture, its label ``[H, W]`` and their stable, unique name."""

    image: Image.Image
    label: Array
    key: str


class DenseSamples(Samples, ABC):
    """Pictures (as ``context``) with dense labels (as the planes ``x``), both square.

    Training takes a random part of a picture (share of its area uniform in [``min_area``, 1], its sides' ratio in
    [3/4, 4/3]), mirrors half of them and resizes to a square; evaluation resizes the whole picture. Pictures are
    resized bilinearly and antialiased, labels to the nearest pixel.

    Args:
        split: "train" or "test".
        size_px: side of the squares in pixels.
        flip: in training, mirror half of the pictures left to right.
        min_area: in training, the least share of a picture's area that is shown; 1 shows all of it.

    Raises:
        ValueError: an argument out of its range.
    """

    carries = frozenset({"size_px", "flip", "min_area"})

    def __init__(self, *, split: Split, size_px: int, flip: bool, min_area: float) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if size_px < 1:
            raise ValueError(f"size_px must be at least 1, got {size_px}")
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area must be above 0 and at most 1, got {min_area}")
        self.split = split
        self.size_px = size_px
        self.extent = (size_px, size_px)
        self.flip = flip
        self.min_area = min_area

    @abstractmethod
    def read(self, index: int) -> Pair:
        """The picture ``index`` in [0, len) and its label, whole.

        Raises:
            UnreadableImage: one of them cannot be read.
        """

    @abstractmethod
    def planes(self, label: Array, key: str) -> Tensor:
        """``[P, H, W]`` float32 of a label ``[H, W]``, as it is after the crop.

        Raises:
            UnreadableImage: it holds what no label may hold.
        """

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """The picture ``index``, cropped and mirrored by ``rng``, or whole without one.

        Raises:
            UnreadableImage: picture or label cannot be read, or their sizes differ.
        """
        image, label, key = self.read(index)
        if image.size != label.shape[1::-1]:
            raise UnreadableImage(key, f"the picture is {image.width}x{image.height} px, its label "
                                       f"{label.shape[1]}x{label.shape[0]}")  # fmt: skip
        box = (0, 0, *image.size) if rng is None else random_box(image.width, image.height, self.min_area, rng)
        picture, label = square_picture(image, self.size_px, box), square_label(label, self.size_px, box)
        if self.flip and rng is not None and rng.random() < 0.5:
            picture, label = ImageOps.mirror(picture), label[:, ::-1]
        return Sample(x=self.planes(np.ascontiguousarray(label), key), label=UNKNOWN_LABEL, key=key,
                      context=to_tensor(picture))  # fmt: skip


class DepthSamples(DenseSamples, ABC):
    """Labels are depths in metres; ``x [1, H, W]`` counts bins (:class:`tessella.labels.depth.DepthBins`).

    Args:
        split, size_px, flip, min_area: see :class:`DenseSamples`.
        num_bins: of depth.
        high_m: where the last bin ends, in metres.
    """

    medium: ClassVar[str] = "depth"
    carries = DenseSamples.carries | {"num_bins", "high_m"}

    def __init__(
        self, *, split: Split, size_px: int, flip: bool, min_area: float, num_bins: int, high_m: float
    ) -> None:
        super().__init__(split=split, size_px=size_px, flip=flip, min_area=min_area)
        self.bins = DepthBins(num_bins, high_m=high_m)

    def planes(self, label: Array, key: str) -> Tensor:
        """See :class:`DenseSamples`; holes (0, negative, infinite, NaN) have no depth."""
        try:
            return self.bins.to_plane(checked_depth(label, key))[None]
        except ValueError as error:
            raise UnreadableImage(key, str(error).removeprefix(f"{key}: ")) from None

    @classmethod
    def medium_spec(cls, section: Spec) -> Spec:
        """See :class:`Samples`."""
        return {"name": cls.medium, **arguments_of(cls, section, "num_bins", "high_m")}


class PanopticSamples(DenseSamples, ABC):
    """Labels are ids of segments, 0 for void and -1 for what is not to be learned.

    ``x [2, H, W]`` holds classes and instances, see :class:`tessella.labels.panoptic.PanopticPlanes`.

    Args:
        split, size_px, flip, min_area: see :class:`DenseSamples`.
        class_names: of the categories.
        things: names of those that are things.
        num_instances: numbers of the instance plane, 0 included.
    """

    medium: ClassVar[str] = "panoptic"
    carries = DenseSamples.carries | {"num_instances"}

    def __init__(
        self,
        *,
        split: Split,
        size_px: int,
        flip: bool,
        min_area: float,
        class_names: Sequence[str],
        things: Sequence[str],
        num_instances: int,
    ) -> None:
        super().__init__(split=split, size_px=size_px, flip=flip, min_area=min_area)
        if unknown := set(things) - set(class_names):
            raise ValueError(f"things {sorted(unknown)} are no class_names; accepted: {', '.join(class_names)}")
        self.class_names = tuple(class_names)
        self.things = tuple(things)
        self.codec = PanopticPlanes(len(class_names), num_instances)

    @abstractmethod
    def categories(self, ids: list[int], key: str) -> dict[int, int]:
        """The category of each segment of a picture by its id.

        Raises:
            UnreadableImage: an id that none has.
        """

    def planes(self, label: Array, key: str) -> Tensor:
        """See :class:`DenseSamples`."""
        ids = torch.from_numpy(label.astype(np.int64))
        found = [i for i in ids.unique().tolist() if i > 0]
        try:
            return self.codec.to_planes(Segments(ids, self.categories(found, key)), key)
        except UnreadableImage:
            raise
        except ValueError as error:
            raise UnreadableImage(key, str(error).removeprefix(f"{key}: ")) from None

    @classmethod
    def medium_spec(cls, section: Spec) -> Spec:
        """See :class:`Samples`."""
        return {"name": cls.medium, **arguments_of(cls, section, "class_names", "things", "num_instances")}


def arguments_of(cls: type, section: Spec, *names: str) -> Spec:
    """What a section of a recipe gives for some arguments of a class: its own value, or the constructor's default."""
    parameters = inspect.signature(cls).parameters
    values = {name: section.get(name, parameters[name].default) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def random_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> Box:
    """A part of a picture: its share of the area uniform in [min_area, 1], its aspect log-uniform in [3/4, 4/3].

    All of it where none of ten tries fits.
    """
    for _ in range(_CROP_TRIES):
        area = rng.uniform(min_area, 1) * width * height
        aspect = math.exp(rng.uniform(math.log(_MIN_ASPECT), math.log(_MAX_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers((0, 0), (width - w, height - h), endpoint=True).tolist()
            return left, top, left + w, top + h
    return 0, 0, width, height


def square_picture(image: Image.Image, size_px: int, box: Box | None = None) -> Image.Image:
    """``box`` of the picture (or all of it) at ``size_px`` by ``size_px``, bilinear and antialiased."""
    return image.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box)


def square_label(label: Array, size_px: int, box: Box | None = None) -> Array:
    """``box`` of a label ``[H, W]`` at ``[size_px, size_px]``, each pixel the nearest."""
    if box is not None:
        left, top, right, bottom = box
        label = label[top:bottom, left:right]
    return resized_label(label, size_px, size_px)


def resized_label(label: Array, height: int, width: int) -> Array:
    """``[height, width]`` of a label ``[H, W]``, each pixel the nearest."""
    # Exactly: pixel i has its centre at (i + 1/2) H / height.
    wanted = zip((height, width), label.shape, strict=True)
    rows, columns = ((2 * np.arange(n) + 1) * size // (2 * n) for n, size in wanted)
    nearest: Array = label[rows[:, None], columns]
    return nearest


def read_levels(path: Path, key: str) -> Array:
    """The integers of a PNG as they are: ``[H, W]`` of 8 or 16 bits or palette indices, ``[H, W, 3]`` of colour.

    Raises:
        UnreadableImage: no such file, not a PNG, damaged, or pixels of another kind.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("L", "P", "I", "I;16", "RGB"):
                raise UnreadableImage(key, f"label {path.name} has pixels of mode {image.mode}; accepted are 8 or 16 "
                                           "bits of grey, a palette, or RGB")  # fmt: skip
            return np.asarray(image).astype(np.int64)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(key, f"label {path.name} cannot be read: {error}") from error


def read_plane(path: Path, key: str) -> Array:
    """:func:`read_levels` of a single channel.

    Raises:
        UnreadableImage: see there, or a colour picture.
    """
    levels = read_levels(path, key)
    if levels.ndim != 2:
        raise UnreadableImage(key, f"label {path.name} is a colour picture; one channel of numbers is needed")
    return levels


def require_folder(path: Path, what: str) -> Path:
    """``path``, which must be a folder.

    Raises:
        DataError: it is none.
    """
    if not path.is_dir():
        raise DataError(f"no folder {path}, which should hold {what}")
    return path
