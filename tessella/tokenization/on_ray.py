"""Ray: processes of this machine that Ray starts, or those of a cluster."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tessella.extras import require
from tessella.processes import keep_freed_memory
from tessella.tokenization.executors import Executor, WorkerError
from tessella.tokenization.plan import Record
from tessella.tokenization.unit import Job, Worker

# How often Ray starts a worker anew that was lost with its machine, and its shard with it.
_RESTARTS = 3


@dataclass(frozen=True)
class OnRay(Executor):
    """Ray actors, each with one CPU, and one GPU where the job's device is one.

    Joins the cluster that ``RAY_ADDRESS`` names, or starts a Ray of this machine and ends it afterwards. Plain actors,
    not Ray Data: what is finished is known from the folder, so nothing of its checkpoints is needed, which want a CPU
    to spare. On a cluster data, tokenizer and output lie on a file system that all machines share.

    Attributes:
        workers: their number; 0 for as many as the cluster has CPUs, or GPUs where the device is one.
    """

    workers: int

    def run(self, job: Job, numbers: Sequence[int], advance: Callable[[int], None]) -> Iterator[Record]:
        """See :class:`Executor`; inputs count when their shard is finished.

        Raises:
            ImportError: Ray is not installed.
            WorkerError: no cluster at ``RAY_ADDRESS``, or workers were lost again and again.
            TessellaError: whatever else a worker found wrong.
        """
        ray = require("ray", extra="ray")
        joined = ray.is_initialized()
        if not joined:
            # "local": without an address Ray would look for whatever was started last on this machine.
            address = os.environ.get("RAY_ADDRESS", "local")
            dashboard = False if address == "local" else None
            try:
                ray.init(address, log_to_driver=False, include_dashboard=dashboard, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise WorkerError(f"no Ray cluster at RAY_ADDRESS={address}: {error}") from error
        try:
            yield from self._run(ray, job, numbers, advance)
        finally:
            if not joined:
                ray.shutdown()

    def _run(self, ray: Any, job: Job, numbers: Sequence[int], advance: Callable[[int], None]) -> Iterator[Record]:
        kind = "GPU" if job.device.startswith("cuda") else "CPU"
        count = min(self.workers or int(ray.cluster_resources().get(kind, 1)), len(numbers))
        waiting = deque(numbers)
        actor = ray.remote(num_cpus=1, num_gpus=int(kind == "GPU"), max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
        workers = [actor(_Actor).remote(job) for _ in range(count)]
        running = {worker.make.remote(waiting.popleft()): worker for worker in workers}
        while running:
            (finished, *_), _ = ray.wait(list(running), num_returns=1)
            worker = running.pop(finished)
            try:
                record: Record = ray.get(finished)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise WorkerError(f"Ray lost a worker: {error}; finished shards stay") from error
            if waiting:
                running[worker.make.remote(waiting.popleft())] = worker
            advance(len(job.plan.inputs(record.number)))
            yield record


class _Actor:
    """A worker in a process of Ray's."""

    def __init__(self, job: Job) -> None:
        keep_freed_memory()
        self._worker = Worker(job)

    def make(self, number: int) -> Record:
        (record,) = self._worker.run(iter([number]), _ignore)
        return record


def _ignore(done: int) -> None:
    """Progress is counted by shards."""
