"""Who makes the shards: this process, processes of this machine, or those of a Ray cluster. One interface for all."""

from __future__ import annotations

import multiprocessing
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, cast

from tessella.distributed import device_of
from tessella.errors import TessellaError
from tessella.processes import end_with_parent, keep_freed_memory, leave_signals_to_parent
from tessella.tokenization.plan import Record
from tessella.tokenization.unit import Job, Worker
from tessella.tokenizer import Tokenizer

# Shards that a worker knows of at once: the one it is at, and the next, which it reads ahead of.
_OUTSTANDING = 2


class WorkerError(TessellaError, RuntimeError):
    """A worker ended before its work did; the message says how."""


class Executor(ABC):
    """Has shards made. Whichever does it, and in whatever order, the same shards come out."""

    @abstractmethod
    def run(self, job: Job, numbers: Sequence[int], advance: Callable[[int], None]) -> Iterator[Record]:
        """The records of the shards ``numbers``, each as soon as it is finished.

        Args:
            job: what they are made of.
            numbers: which of the plan's shards.
            advance: told how many inputs more are done.
        """


@dataclass(frozen=True)
class InProcess(Executor):
    """This process, with the tokenizer that it has loaded anyway."""

    tokenizer: Tokenizer

    def run(self, job: Job, numbers: Sequence[int], advance: Callable[[int], None]) -> Iterator[Record]:
        """See :class:`Executor`."""
        return Worker(job, self.tokenizer).run(iter(numbers), advance)


@dataclass(frozen=True)
class LocalProcesses(Executor):
    """So many processes beside this one. They end with it, however it ends.

    As with every use of processes, a script that asks for them needs the ``if __name__ == "__main__":`` guard.
    """

    workers: int

    def run(self, job: Job, numbers: Sequence[int], advance: Callable[[int], None]) -> Iterator[Record]:
        """See :class:`Executor`.

        Raises:
            WorkerError: a worker was killed.
            TessellaError: whatever else a worker found wrong.
        """
        waiting = deque(numbers)
        count = min(self.workers, len(numbers))
        workers = [_start(replace(job, device=device_of(job.device, number))) for number in range(count)]
        try:
            for worker in workers * _OUTSTANDING:
                worker.give(waiting)
            busy = {worker.pipe: worker for worker in workers}
            while busy:
                for pipe in wait(list(busy)):
                    worker = busy[cast(Connection, pipe)]
                    message = worker.receive()
                    if isinstance(message, int):
                        advance(message)
                    elif isinstance(message, Record):
                        worker.give(waiting)
                        yield message
                    elif message is None:
                        del busy[worker.pipe]
                    else:
                        raise message
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()


@dataclass
class _Process:
    process: SpawnProcess
    pipe: Connection
    told_all: bool = False

    def give(self, waiting: deque[int]) -> None:
        """The next shard; once there is none, that this was all."""
        if not self.told_all:
            self.told_all = not waiting
            self._send(waiting.popleft() if waiting else None)

    def _send(self, number: int | None) -> None:
        try:
            self.pipe.send(number)
        except BrokenPipeError:
            return  # it is gone; what it said last, and that it is gone, is still to be read

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return WorkerError(
                f"a worker ended with exit status {self.process.exitcode} (-9: killed, perhaps for want of memory); "
                "finished shards stay, and the same command goes on from them"
            )


def _start(job: Job) -> _Process:
    # Processes that start clean: a fork of this one would inherit the locks that torch's other threads hold.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Process(process, ours)


def _work(job: Job, pipe: Connection, parent: int) -> None:
    """A worker's life: records and counts of inputs go out, at last None; or the exception that ended it."""
    end_with_parent(parent)
    leave_signals_to_parent()
    keep_freed_memory()
    try:
        for record in Worker(job).run(iter(pipe.recv, None), pipe.send):
            pipe.send(record)
        pipe.send(None)
    except TessellaError as error:
        pipe.send(error)
