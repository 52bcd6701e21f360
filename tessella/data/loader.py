"""The two orders that a program reads data in: endless and shuffled for training, once and in order for evaluation."""

from __future__ import annotations

import atexit
import functools
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessella.data.base import Batch, DataError, Sample, Samples, UnreadableImage, list_skipped, random_for
from tessella.processes import end_with_parent, leave_signals_to_parent

_AHEAD = 3  # batches that wait while one is used
_WAIT_SEC = 0.2

T = TypeVar("T")

# A run of so many unreadable samples is no accident: the search for a replacement ends.
_MAX_UNREADABLE_RUN = 1000


def _order(seed: int, epoch: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng((seed, epoch, 0)).permutation(length)


_Draw = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class _TrainingDraws(Iterable[list[_Draw]]):
    """The endless sequence of draws in batches: epoch after epoch, each in its own order, with no gap between them.

    Of every batch each rank yields its part; the parts of all ranks, in their order, are the batch.
    """

    length: int
    batch_size: int
    seed: int
    start_batch: int
    rank: int
    num_ranks: int

    def __iter__(self) -> Iterator[list[_Draw]]:
        batch: list[_Draw] = []
        size = self.batch_size // self.num_ranks
        own = slice(self.rank * size, (self.rank + 1) * size)
        epoch, start = divmod(self.start_batch * self.batch_size, self.length)
        while True:
            for index in _order(self.seed, epoch, self.length)[start:].tolist():
                batch.append((epoch, index))
                if len(batch) == self.batch_size:
                    yield batch[own]
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
        return _collate(samples, skipped, pads=self.dataset.pads)

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
        raise DataError(f"{attempts} pictures in a row cannot be used: {list_skipped(skipped)}")


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
        return _collate(samples, skipped, pads=self.dataset.pads)


def training_batches(
    dataset: Samples, *, batch_size: int, seed: int, start_batch: int = 0, num_workers: int = 0, rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[Batch]:  # fmt: skip
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
        rank: which part of every batch to give, of ``num_ranks`` equal ones: the parts together are the batches that
            one rank would be given.
        num_ranks: divides ``batch_size``.

    Raises:
        ValueError: an argument out of its range.
        DataError: while iterating: pictures of different sizes in a batch, a long run of pictures none of which can be
            read, or what else the data set finds wrong.
    """
    _check_least(batch_size=(batch_size, 1), seed=(seed, 0), start_batch=(start_batch, 0), num_workers=(num_workers, 0))
    if not 0 <= rank < num_ranks or batch_size % num_ranks:
        raise ValueError(
            f"batch_size ({batch_size}) must be a multiple of num_ranks ({num_ranks}), and rank ({rank}) below it"
        )
    draws = _TrainingDraws(len(dataset), batch_size, seed, start_batch, rank, num_ranks)
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


def ahead(items: Iterator[T], depth: int = _AHEAD) -> Iterator[T]:
    """The same items, made in a thread while those before them are used; its exceptions arrive in their place."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((item, error), timeout=_WAIT_SEC)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                offer(item, None)
                if stopped.is_set():
                    return
            offer(None, None)
        except BaseException as error:
            offer(None, error)

    threading.Thread(target=produce, name="reader", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()


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
        worker_init_fn=functools.partial(_prepare_worker, os.getpid()),
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the program's own randomness
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _prepare_worker(parent: int, worker: int) -> None:
    end_with_parent(parent)
    leave_signals_to_parent()
    # When the program has seen enough, the thread that sends batches is still at it, inside C++. Stopped there, as the
    # interpreter stops its threads, it would abort the process; so the worker ends at once, as forked ones do.
    atexit.register(os._exit, 0)


def _same(batch: Any) -> Any:
    return batch


def _collate(samples: list[Sample], skipped: list[tuple[str, str]], *, pads: bool) -> Batch:
    """Every tensor of the samples under its name; signals of different sizes are padded where ``pads``."""
    if not samples:
        return Batch(x=torch.empty(0, 3, 0, 0), label=torch.empty(0, dtype=torch.int64), key=[], skipped=skipped)
    shapes = [sample["x"].shape for sample in samples]
    batch: dict[str, Any] = {}
    if pads and any(shape != shapes[0] for shape in shapes):
        extents = torch.tensor([shape[1:] for shape in shapes], dtype=torch.int64)
        batch["extent"] = extents
        whole = extents.amax(0).tolist()
        samples = [cast(Sample, {**sample, "x": _padded(sample["x"], whole)}) for sample in samples]
    for name, value in samples[0].items():
        if isinstance(value, Tensor):
            batch[name] = _stack(name, samples)
    batch["label"] = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
    return cast(Batch, {**batch, "key": [sample["key"] for sample in samples], "skipped": skipped})


def _padded(x: Tensor, extent: list[int]) -> Tensor:
    """``x [C, *X]`` with zeros behind it, up to ``extent``."""
    missing = [size - own for size, own in zip(extent, x.shape[1:], strict=True)]
    widths = [width for size in reversed(missing) for width in (0, size)]
    return torch.nn.functional.pad(x, widths)


def _stack(name: str, samples: list[Sample]) -> Tensor:
    values: list[Tensor] = [sample[name] for sample in samples]  # type: ignore[literal-required]
    for sample, value in zip(samples, values, strict=True):
        if value.shape != values[0].shape:
            size, other = ("x".join(map(str, reversed(tensor.shape[1:]))) for tensor in (values[0], value))
            what = "samples" if name == "x" else f"'{name}'"
            raise DataError(
                f"{what} of different sizes in a batch: {samples[0]['key']} is {size}, {sample['key']} {other}; set "
                "crop_px, or batch_size=1"
            )
    # In numpy, hence in one thread: torch would wait for threads that a busy machine lets start late.
    return torch.from_numpy(np.stack([value.numpy() for value in values]))


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
            raise DataError(f"none of the pictures can be used: {list_skipped(held['skipped'])}")
        yield held


def _check_least(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
