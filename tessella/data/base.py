"""The protocol of data: samples by index; and what all data sets of pictures do alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tessella.data._errors import DataError as DataError
from tessella.data._errors import UnreadableImage as UnreadableImage
from tessella.data._names import file_size, identity_of
from tessella.data._pixels import BitDepth, Pixels, crop, mirror, resize_shorter_side
from tessella.data._pixels import to_tensor as to_tensor
from tessella.data.decode import decode
from tessella.registry import Spec
from tessella.text import printable

Split = Literal["train", "test"]

UNKNOWN_LABEL = -1

# Until so many pictures were asked for, their share says nothing about the data set.
_MIN_PICTURES_TO_JUDGE = 200


class Picture(NamedTuple):
    """What a data set reads: a picture, its class (-1 where unknown) and its stable, unique name.

    The picture is Pillow's where it has 8 bits and 1, 3 or 4 channels, else an array ``[H, W, C]`` uint8 or uint16.
    """

    image: Pixels
    label: int
    key: str


class Sample(TypedDict):
    """A transformed signal, ``x [C, *X]`` float32 in [-1, 1], or a signal's tokens, ``x [*S, K]`` int64.

    ``context`` is what encoder and decoder see beside the signal; further tensors may have names of their own.
    """

    x: Tensor
    label: int
    key: str
    context: NotRequired[Tensor]


@dataclass
class Streamed:
    """A signal of one axis that is too long to be held at once.

    Attributes:
        label: as a sample's.
        key: likewise.
        pieces: ``[C, T']`` float32 in [-1, 1], in order; reading them may raise :class:`UnreadableImage`.
    """

    label: int
    key: str
    pieces: Iterator[Tensor]


class Batch(TypedDict):
    """B samples: every tensor of theirs stacked under its name, ``label [B]`` int64, B keys.

    ``skipped`` are (key, reason) of what was left out. Where signals of different sizes were padded with zeros at their
    ends, ``extent [B, len(X)]`` int64 says where each one ends.
    """

    x: Tensor
    label: Tensor
    key: list[str]
    skipped: list[tuple[str, str]]
    context: NotRequired[Tensor]
    extent: NotRequired[Tensor]


class Samples(Dataset[Sample], ABC):
    """Samples by index, as training draws them and as evaluation does.

    Attributes:
        medium: what its signals are, a file of ``tessella/media``.
        pads: whether signals of different lengths may share a batch, zeros after the shorter ones.
        carries: arguments that say what every sample is like, which other data in the place of this one keeps.
        window: those of them that make a sample a part of a signal; without them it is a whole one.
        class_names: by label; empty where the classes have no names.
        extent: the size X of every sample; None where they differ.
    """

    medium: ClassVar[str] = "image"
    pads: ClassVar[bool] = False
    carries: ClassVar[frozenset[str]] = frozenset()
    window: ClassVar[frozenset[str]] = frozenset()

    class_names: tuple[str, ...] = ()
    extent: tuple[int, ...] | None = None

    def identity(self) -> Spec:
        """What is read, in a few words: the number of samples, and a hash over the names and sizes of the files.

        Where these lie has no part in it. Two data sets of other identities give other samples; two of the same one the
        same samples, unless a file was changed and kept its size.
        """
        files = identity_of((f"{file.parent.name}/{file.name}", file_size(file)) for file in self.sources())
        return {**files, "count": len(self)}

    def sources(self) -> Iterable[Path]:
        """The files that it reads, always in the same order; none where it makes its samples."""
        return ()

    @classmethod
    def medium_spec(cls, section: Spec) -> Spec:
        """The [medium] of a recipe whose [data] is ``section``."""
        return {"name": cls.medium}

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """The sample ``index``, varied by ``rng``; always the same without one.

        Raises:
            UnreadableImage: it cannot be decoded.
        """

    def sample_or_stream(self, index: int, rng: np.random.Generator | None = None) -> Sample | Streamed:
        """:meth:`sample`, or its signal in pieces where it is long.

        Raises:
            UnreadableImage: see :meth:`sample`.
        """
        return self.sample(index, rng)

    def __getitem__(self, index: int) -> Sample:
        """The sample ``index`` as evaluation sees it.

        Raises:
            IndexError: there is no such sample.
            UnreadableImage: see :meth:`sample`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)})")
        return self.sample(index)


class ImageDataset(Samples, ABC):
    """Pictures by index. Decoding happens where the index is asked for, so in the loader's workers.

    For training a picture is resized, cropped at random and perhaps flipped; for evaluation it is resized and cropped
    at its centre. :func:`training_batches` and :func:`evaluation_batches` decide which; ``split`` only decides on the
    pictures.

    Args:
        split: "train", or "test" for the held-out pictures.
        crop_px: side of the square crop in pixels; None keeps whole pictures.
        resize_px: length in pixels that the shorter side is brought to first (bicubic, antialiased); None: as it is.
        flip: in training, mirror half of the pictures left to right.
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number, from TIFF or .npy: see
            :func:`~tessella.data.decode.decode`, which says what is made of pictures with others.
        bit_depth: 8, or 16 to keep the levels of 16-bit pictures.

    Raises:
        ValueError: an argument out of its range.
    """

    carries = frozenset({"crop_px", "resize_px", "flip", "channels", "bit_depth"})
    window = frozenset({"crop_px", "resize_px"})

    def __init__(
        self,
        *,
        split: Split,
        crop_px: int | None = None,
        resize_px: int | None = None,
        flip: bool = False,
        channels: int = 3,
        bit_depth: BitDepth = 8,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        for name, size in (("crop_px", crop_px), ("resize_px", resize_px), ("channels", channels)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if crop_px is not None and resize_px is not None and resize_px < crop_px:
            raise ValueError(f"resize_px ({resize_px}) must be at least crop_px ({crop_px})")
        if bit_depth not in (8, 16):
            raise ValueError(f"bit_depth must be 8 or 16, got {bit_depth}")
        self.split = split
        self.crop_px = crop_px
        self.extent = None if crop_px is None else (crop_px, crop_px)
        self.resize_px = resize_px
        self.flip = flip
        self.channels = channels
        self.bit_depth = bit_depth

    @classmethod
    def medium_spec(cls, section: Spec) -> Spec:
        """Pictures of the channels and the bit depth that are read."""
        return {"name": cls.medium, **{key: section[key] for key in ("channels", "bit_depth") if key in section}}

    def decode(self, source: bytes | Path, key: str) -> Pixels:
        """The picture in encoded bytes or a file, with the channels and the bit depth of this data set.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return decode(source, key, channels=self.channels, bit_depth=self.bit_depth)

    @abstractmethod
    def read(self, index: int) -> Picture:
        """The picture ``index`` in [0, len), whole.

        Raises:
            UnreadableImage: it cannot be decoded.
        """

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """The picture ``index``, cropped and flipped by ``rng``, or at its centre without one.

        Raises:
            UnreadableImage: it cannot be decoded, or is smaller than the crop.
        """
        image, label, key = self.read(index)
        if self.resize_px is not None:
            image = resize_shorter_side(image, self.resize_px)
        if self.crop_px is not None:
            image = crop(image, self.crop_px, key, rng)
        if self.flip and rng is not None and rng.random() < 0.5:
            image = mirror(image)
        return Sample(x=to_tensor(image), label=label, key=key)


def random_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The randomness of one picture in one epoch: no worker, order or batch has a part in it."""
    return np.random.default_rng((seed, epoch, 1 + index))  # entry 0 is the epoch's order


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on ``device``."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return cast(Batch, moved)


def of_one_size(batch: Batch) -> Iterator[Batch]:
    """The batch, or each of its signals without what it was padded by."""
    if not len(batch["x"]):
        return
    if "extent" not in batch:
        yield batch
        return
    for row, extent in enumerate(batch["extent"].tolist()):
        window = (slice(row, row + 1), slice(None), *map(slice, extent))
        one = Batch(x=batch["x"][window], label=batch["label"][row : row + 1], key=[batch["key"][row]], skipped=[])
        if "context" in batch:
            one["context"] = batch["context"][row : row + 1]
        yield one


def list_skipped(skipped: Iterable[tuple[str, str]]) -> str:
    """The first few distinct ones, for messages."""
    distinct = [f"{printable(key)}: {reason}" for key, reason in dict(skipped).items()]
    rest = [f"and {len(distinct) - 5} more"] if len(distinct) > 5 else []
    return "; ".join(distinct[:5] + rest)


class SkipBudget:
    """Lets a program go on past a few unreadable pictures, and stops it when they are many.

    Args:
        max_skip_share: the share of pictures asked for that may be unreadable, in [0, 1].
    """

    def __init__(self, max_skip_share: float = 0.05) -> None:
        if not 0 <= max_skip_share <= 1:
            raise ValueError(f"max_skip_share must be in [0, 1], got {max_skip_share}")
        self.max_skip_share = max_skip_share
        self.num_read = 0
        self.num_skipped = 0
        self._skipped: dict[str, str] = {}

    def count(self, batch: Batch) -> None:
        """Account for one batch.

        Raises:
            DataError: more than the share is unreadable, of at least 200 pictures; it names some of them.
        """
        self.num_read += len(batch["key"])
        self.num_skipped += len(batch["skipped"])
        self._skipped |= dict(batch["skipped"])
        if self.num_read + self.num_skipped >= _MIN_PICTURES_TO_JUDGE:
            self.check()

    def check(self) -> None:
        """Judge what was counted, however little: at the end of an evaluation.

        Raises:
            DataError: more than the share is unreadable; it names some of them.
        """
        total = self.num_read + self.num_skipped
        if self.num_skipped > self.max_skip_share * total:
            raise DataError(
                f"{self.num_skipped} of {total} pictures cannot be used, more than max_skip_share="
                f"{self.max_skip_share:g} allows: {list_skipped(self._skipped.items())}"
            )
