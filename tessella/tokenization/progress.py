"""How far it is, on standard error: inputs over all workers, their rate, the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def shown(done: int, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many inputs more are done.

    Args:
        done: what an earlier run has done; no part of the rate.
        total: of all.
        unit: what an input is called.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenize"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())  # fmt: skip
    started, count = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tokenize", total=total, completed=done, rate="")

        def advance(more: int) -> None:
            nonlocal count
            count += more
            rate = count / max(time.monotonic() - started, 1e-9)
            progress.update(task, completed=done + count, rate=f"{rate:.1f} {unit}/s")

        yield advance
