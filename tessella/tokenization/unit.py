"""The unit of work: a range of inputs becomes one shard, wherever that is done and however often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessella.checkpoint import fingerprint, load
from tessella.data._timing import measured
from tessella.data._token_rows import Rows, flaw_of
from tessella.data.base import DataError, Sample, Streamed, UnreadableImage
from tessella.data.loader import ahead
from tessella.tokenization.plan import Output, Plan, Record
from tessella.tokenization.source import Source
from tessella.tokenizer import Tokenizer

# Of signals that have no common size, a batch ends here: 256 MB.
_MOST_VALUES = 2**26


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    Attributes:
        tokenizer: where it is loaded from.
        device: where it computes.
        source: what is read.
        plan: which inputs are which shard.
        folder: of the shards.
        batch_size: signals that are encoded at once.
        threads: torch's; None leaves them as they are.
    """

    tokenizer: Path
    device: str
    source: Source
    plan: Plan
    folder: Path
    batch_size: int
    threads: int | None = None


@dataclass
class _Read:
    """Some rows of one shard, read: samples with the input they are of, and what was refused."""

    number: int
    samples: list[tuple[int, Sample | Streamed]] = field(default_factory=list)
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    inputs: int = 0
    num_values: int = 0
    last: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def take(self, source: Source, index: int, variant: int) -> None:
        """Add a row of the input ``index``, or why there is none."""
        try:
            sample = source.sample(index, variant)
        except UnreadableImage as error:
            self.refused.setdefault(index, (error.key, error.reason))
            return
        if isinstance(sample, Streamed):
            key, flaw, num_values = sample.key, flaw_of(sample.key, (1,), (1,)), 0
        else:
            key, num_values = sample["key"], sample["x"].numel()
            flaw = flaw_of(key, (1,), sample["x"].shape[1:])
        if flaw is None:
            self.samples.append((index, sample))
            self.num_values += num_values
        else:
            self.refused.setdefault(index, (key, flaw))


class _Row(NamedTuple):
    """A row of tokens, and the input it is of."""

    number: int
    key: str
    label: int
    indices: Tensor
    extent: tuple[int, ...]


class Worker:
    """Makes shards, reading ahead of the model in a thread.

    Args:
        job: what to do.
        tokenizer: that of the job, where it is loaded already.

    Raises:
        DataError: the tokenizer has changed since the plan was made.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.tokenizer = tokenizer if tokenizer is not None else load(job.tokenizer, device=job.device)
        if tokenizer is None and fingerprint(self.tokenizer) != job.plan.space.fingerprint:
            raise DataError(f"{job.tokenizer} is no longer the tokenizer {job.plan.space.fingerprint} of the plan")
        self._output = Output(job.folder, job.plan)

    def run(self, numbers: Iterable[int], advance: Callable[[int], None]) -> Iterator[Record]:
        """Make the shards of ``numbers`` one after the other.

        Args:
            numbers: asked for one at a time, in the thread that reads.
            advance: told how many inputs more are done.
        """
        shard = _Shard(self)
        for read in ahead(self._reads(numbers)):
            shard.encode(read)
            advance(read.inputs)
            if read.last:
                yield shard.save(read.number, self._output)
                shard = _Shard(self)

    def _reads(self, numbers: Iterable[int]) -> Iterator[_Read]:
        source = self.job.source
        rows_per_input = source.rows_per_input
        size = self.job.batch_size if source.alike else 1
        for number in numbers:
            inputs = self.job.plan.inputs(number)
            next_row, stop = inputs.start * rows_per_input, inputs.stop * rows_per_input
            while True:
                read = _Read(number)
                began = time.perf_counter()
                with measured(read.seconds):
                    while next_row < stop and len(read.samples) < size and read.num_values < _MOST_VALUES:
                        index, variant = divmod(next_row, rows_per_input)
                        read.inputs += variant == 0
                        read.take(source, index, variant)
                        next_row += 1
                spent = time.perf_counter() - began
                read.seconds["read"] = spent - read.seconds.get("decode", 0.0)
                read.last = next_row >= stop
                yield read
                if read.last:
                    break


class _Shard:
    """The rows of the shard that is being made."""

    def __init__(self, worker: Worker) -> None:
        self._tokenizer = worker.tokenizer
        self._space = worker.job.plan.space
        self._rows: list[_Row] = []
        self._refused: dict[int, tuple[str, str]] = {}
        self._seconds: dict[str, float] = {}

    def encode(self, read: _Read) -> None:
        began = time.perf_counter()
        held = {i: sample for i, (_, sample) in enumerate(read.samples) if not isinstance(sample, Streamed)}
        tokens: dict[int, Tensor] = {}
        for group in _alike(held):
            x = _stack([held[i]["x"] for i in group]).to(self._tokenizer.device)
            context = None
            if "context" in held[group[0]]:
                context = _stack([held[i]["context"] for i in group]).to(self._tokenizer.device)
            indices = self._tokenizer.encode(x, context, pad=True).cpu()
            tokens |= dict(zip(group, indices, strict=True))
        for position, (index, sample) in enumerate(read.samples):
            if isinstance(sample, Streamed):
                self._encode_in_pieces(index, sample)
            else:
                extent = tuple(sample["x"].shape[1:])
                self._rows.append(_Row(index, sample["key"], sample["label"], tokens[position], extent))
        self._refused |= {index: pair for index, pair in read.refused.items() if index not in self._refused}
        self._add({**read.seconds, "model": time.perf_counter() - began})

    def _encode_in_pieces(self, index: int, signal: Streamed) -> None:
        length = 0

        def pieces() -> Iterator[Tensor]:
            nonlocal length
            for piece in ahead(signal.pieces):
                length += piece.shape[-1]
                yield piece[None].to(self._tokenizer.device)

        try:
            indices = torch.cat([part[0].cpu() for part in self._tokenizer.stream().encode(pieces())])
        except UnreadableImage as error:
            self._refused.setdefault(index, (error.key, error.reason))
            return
        if (flaw := flaw_of(signal.key, indices.shape[:-1], (length,))) is not None:
            self._refused.setdefault(index, (signal.key, flaw))
            return
        self._rows.append(_Row(index, signal.key, signal.label, indices, (length,)))

    def save(self, number: int, output: Output) -> Record:
        """Write what was gathered; an input of which one view was refused is refused whole."""
        began = time.perf_counter()
        rows = Rows(self._space)
        for row in self._rows:
            if row.number not in self._refused:
                rows.add(row.key, row.label, row.indices, row.extent)
        skipped = [_plain(*self._refused[index]) for index in sorted(self._refused)]
        record = output.save(number, rows.to_bytes(), len(rows), skipped)
        self._add({"write": time.perf_counter() - began})
        return Record(record.number, record.shard, record.skipped, self._seconds)

    def _add(self, seconds: dict[str, float]) -> None:
        for part, spent in seconds.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + spent


def _plain(key: str, reason: str) -> tuple[str, str]:
    """Text that UTF-8 can hold: file names may be no text."""
    return key.encode("utf-8", "backslashreplace").decode(), reason.encode("utf-8", "backslashreplace").decode()


def _alike(samples: Mapping[int, Sample]) -> list[list[int]]:
    """Keys of samples whose signals and contexts have one shape: these are encoded together, none is padded.

    Zeros behind a signal would be seen by its last tokens, so that they depended on the company it was read in.
    """
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for position, sample in samples.items():
        shapes = (sample["x"].shape, *([sample["context"].shape] if "context" in sample else []))
        groups.setdefault(shapes, []).append(position)
    return list(groups.values())


def _stack(values: list[Tensor]) -> Tensor:
    # In numpy, hence in one thread: torch would wait for threads that a busy machine lets start late.
    return torch.from_numpy(np.stack([value.numpy() for value in values]))
