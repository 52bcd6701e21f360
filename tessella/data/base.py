"""The protocol of picture data, and the two orders a program reads it in: for training and for evaluation."""

from __future__ import annotations

import atexit
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessella.data._errors import DataError as DataError
from tessella.data._errors import UnreadableImage as UnreadableImage

Split = Literal["train", "test"]

UNKNOWN_LABEL = -1

# A run of so many unreadable pictures is no accident: the search for a replacement ends.
_MAX_UNREADABLE_RUN = 1000

# Until so many pictures were asked for, their share says nothing about the data set.
_MIN_PICTURES_TO_JUDGE = 200


class Picture(NamedTuple):
    """What a data set reads: an RGB image, its class (-1 where unknown) and its stable, unique name."""

    image: Image.Image
    label: int
    key: str


class Sample(TypedDict):
    """A transformed picture: ``x [3, H, W]`` float32 in [-1, 1]; or a picture's tokens: ``x [*S, K]`` int64."""

    x: Tensor
    label: int
    key: str


class Batch(TypedDict):
    """B samples ``x``, ``label [B]`` int64, B keys; (key, reason) of the pictures left out."""

    x: Tensor
    label: Tensor
    key: list[str]
    skipped: list[tuple[str, str]]


class Samples(Dataset[Sample], ABC):
    """Samples by index, as training draws them and as evaluation does."""

    class_names: tuple[str, ...] = ()  # by label; empty where the classes have no names

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """The sample ``index``, varied by ``rng``; always the same without one.

        Raises:
            UnreadableImage: it cannot be decoded.
        """

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

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self, *, split: Split, crop_px: int | None = None, resize_px: int | None = None, flip: bool = False
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        for name, size in (("crop_px", crop_px), ("resize_px", resize_px)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if crop_px is not None and resize_px is not None and resize_px < crop_px:
            raise ValueError(f"resize_px ({resize_px}) must be at least crop_px ({crop_px})")
        self.split = split
        self.crop_px = crop_px
        self.resize_px = resize_px
        self.flip = flip

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
            image = _resize_shorter_side(image, self.resize_px)
        if self.crop_px is not None:
            image = _crop(image, self.crop_px, key, rng)
        if self.flip and rng is not None and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return Sample(x=to_tensor(image), label=label, key=key)


def to_tensor(image: Image.Image) -> Tensor:
    """``[3, H, W]`` float32 in [-1, 1] of an RGB image: v / 127.5 - 1."""
    # In numpy, hence in one thread: torch would wait for threads that a busy machine lets start late.
    levels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    return torch.from_numpy(levels / np.float32(127.5) - np.float32(1))


def _resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int, key: str, rng: np.random.Generator | None) -> Image.Image:
    room_x, room_y = image.width - size, image.height - size
    if min(room_x, room_y) < 0:
        raise UnreadableImage(
            key, f"{image.width}x{image.height} px is smaller than crop_px={size}; resize_px={size} would enlarge it"
        )
    left, top = (room_x // 2, room_y // 2) if rng is None else rng.integers((0, 0), (room_x, room_y), endpoint=True)
    return image.crop((left, top, left + size, top + size))


def random_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The randomness of one picture in one epoch: no worker, order or batch has a part in it."""
    return np.random.default_rng((seed, epoch, 1 + index))  # entry 0 is the epoch's order


def _order(seed: int, epoch: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng((seed, epoch, 0)).permutation(length)


_Draw = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class _TrainingDraws(Iterable[list[_Draw]]):
    """The endless sequence of draws in batches: epoch after epoch, each in its own order, with no gap between them."""

    length: int
    batch_size: int
    seed: int
    start_batch: int

    def __iter__(self) -> Iterator[list[_Draw]]:
        batch: list[_Draw] = []
        epoch, start = divmod(self.start_batch * self.batch_size, self.length)
        while True:
            for index in _order(self.seed, epoch, self.length)[start:].tolist():
                batch.append((epoch, index))
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            epoch, start = epoch + 1, 0


class _View(Dataset["Batch | DataError"], ABC):
    """A data set indexed by whole batches."""

    @abstractmethod
    def batch(self, indices: Any) -> Batch: ...

    def __getitem__(self, indices: Any) -> Batch | DataError:
        """The batch; an error in the data is handed over as a value, since the loader would bury it in a traceback."""
        try:
            return self.batch(indices)
        except DataError as error:
            return error


@dataclass(frozen=True)
class _TrainingView(_View):
    dataset: Samples
    seed: int

    def batch(self, draws: list[_Draw]) -> Batch:
        skipped: list[tuple[str, str]] = []
        samples = [self._readable_sample(draw, skipped) for draw in draws]
        return _collate(samples, skipped)

    def _readable_sample(self, draw: _Draw, skipped: list[tuple[str, str]]) -> Sample:
        """The sample drawn, or the next one in the data set's own order that can be read."""
        epoch, index = draw
        length = len(self.dataset)
        attempts = min(length, _MAX_UNREADABLE_RUN)
        for step in range(attempts):
            try:
                return self.dataset.sample((index + step) % length, random_for(self.seed, epoch, index))
            except UnreadableImage as error:
                skipped.append((error.key, error.reason))
        raise DataError(f"{attempts} pictures in a row cannot be used: {_list_skipped(skipped)}")


@dataclass(frozen=True)
class _EvaluationView(_View):
    dataset: Samples

    def batch(self, indices: range) -> Batch:
        samples: list[Sample] = []
        skipped: list[tuple[str, str]] = []
        for index in indices:
            try:
                samples.append(self.dataset.sample(index))
            except UnreadableImage as error:
                skipped.append((error.key, error.reason))
        return _collate(samples, skipped)


def training_batches(
    dataset: Samples, *, batch_size: int, seed: int, start_batch: int = 0, num_workers: int = 0
) -> Iterator[Batch]:
    """Batches without end, always full: every epoch in a new order, batches running across the epochs' ends.

    All randomness is a function of (seed, epoch, index). Iterating from ``start_batch`` therefore gives, bit for bit,
    the batches that an uninterrupted iteration gives from there, whatever ``num_workers``. A picture that cannot be
    read is replaced by the next one that can, and reported in ``skipped``.

    Args:
        dataset: the pictures; all of one size where ``dataset.crop_px`` is None and ``batch_size`` above 1.
        batch_size: pictures a batch.
        seed: not negative.
        start_batch: number of batches that were already seen.
        num_workers: processes that decode; 0 decodes in this one. As with every use of processes, a script that sets
            it needs the ``if __name__ == "__main__":`` guard.

    Raises:
        ValueError: an argument out of its range.
        DataError: while iterating: pictures of different sizes in a batch, a long run of pictures none of which can be
            read, or what else the data set finds wrong.
    """
    _check_least(batch_size=(batch_size, 1), seed=(seed, 0), start_batch=(start_batch, 0), num_workers=(num_workers, 0))
    draws = _TrainingDraws(len(dataset), batch_size, seed, start_batch)
    return _load(_TrainingView(dataset, seed), draws, num_workers)


def evaluation_batches(
    dataset: Samples, *, batch_size: int, num_workers: int = 0, limit: int | None = None
) -> Iterator[Batch]:
    """Every picture once and in order, cropped at its centre.

    The last batch may be short; so is one with pictures that cannot be read, which its ``skipped`` reports.

    Args:
        dataset: the pictures; all of one size where ``dataset.crop_px`` is None and ``batch_size`` above 1.
        batch_size: pictures a batch.
        num_workers: as for :func:`training_batches`.
        limit: read only so many pictures, the first ones.

    Raises:
        ValueError: an argument out of its range.
        DataError: while iterating: pictures of different sizes in a batch, no picture that can be read, or what else
            the data set finds wrong.
    """
    _check_least(batch_size=(batch_size, 1), limit=(1 if limit is None else limit, 1), num_workers=(num_workers, 0))
    length = len(dataset) if limit is None else min(limit, len(dataset))
    ranges = [range(start, min(start + batch_size, length)) for start in range(0, length, batch_size)]
    return _without_empty(_load(_EvaluationView(dataset), ranges, num_workers))


def _load(view: _View, indices: Iterable[Any], num_workers: int) -> Iterator[Batch]:
    """The view's batches through torch's loader, which holds each worker to one torch thread."""
    loader = DataLoader(
        view,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=_same,
        # Processes that start clean: a fork of this one would inherit the locks that torch's other threads hold. Not
        # those of a fork server: they outlive a program that is killed.
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the program's own randomness
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _prepare_worker(worker: int) -> None:
    # Ctrl-C reaches the workers too, but the program may want to end its step and save first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # When the program has seen enough, the thread that sends batches is still at it, inside C++. Stopped there, as the
    # interpreter stops its threads, it would abort the process; so the worker ends at once, as forked ones do.
    atexit.register(os._exit, 0)


def _same(batch: Any) -> Any:
    return batch


def _collate(samples: list[Sample], skipped: list[tuple[str, str]]) -> Batch:
    for sample in samples:
        if sample["x"].shape != samples[0]["x"].shape:
            (height, width), (other_height, other_width) = samples[0]["x"].shape[1:], sample["x"].shape[1:]
            raise DataError(
                f"pictures of different sizes in a batch: {samples[0]['key']} is {width}x{height} px, {sample['key']} "
                f"{other_width}x{other_height} px; set crop_px, or batch_size=1"
            )
    # Stacked in numpy for the reason given in to_tensor.
    x = np.stack([sample["x"].numpy() for sample in samples]) if samples else np.empty((0, 3, 0, 0), np.float32)
    return Batch(
        x=torch.from_numpy(x),
        label=torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
        key=[sample["key"] for sample in samples],
        skipped=skipped,
    )


def _without_empty(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, where one without pictures hands what it skipped to a neighbour."""
    held: Batch | None = None
    for batch in batches:
        if held is None:
            held = batch
        elif not batch["key"]:
            held["skipped"] += batch["skipped"]
        elif not held["key"]:
            batch["skipped"] = held["skipped"] + batch["skipped"]
            held = batch
        else:
            yield held
            held = batch
    if held is not None:
        if not held["key"]:
            raise DataError(f"none of the pictures can be used: {_list_skipped(held['skipped'])}")
        yield held


def _check_least(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _list_skipped(skipped: Iterable[tuple[str, str]]) -> str:
    """The first few distinct ones, for messages."""
    distinct = [f"{key}: {reason}" for key, reason in dict(skipped).items()]
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
                f"{self.max_skip_share:g} allows: {_list_skipped(self._skipped.items())}"
            )
