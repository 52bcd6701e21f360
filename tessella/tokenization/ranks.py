"""torchrun: the processes of one job share the shards between them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# Ranks wait for the slowest one: for as long as a shard's worth of uneven work takes, not for a network's time-out.
_PATIENCE = datetime.timedelta(days=7)


class Ranks:
    """The ranks of the environment that torchrun sets, as a context; one rank where there is none.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self._group: Any = None
        self._own = False

    def __enter__(self) -> Ranks:
        """Meet the others."""
        if self.size > 1:
            self._own = not dist.is_initialized()
            if self._own:
                dist.init_process_group("gloo", timeout=_PATIENCE)
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        """Part from them."""
        if self._own:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this rank plans, writes the manifest and shows the progress."""
        return self.rank == 0

    def share(self, numbers: Sequence[int]) -> list[int]:
        """This rank's part."""
        return list(numbers[self.rank :: self.size])

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self._group)
        return values
