"""Progress bars of commands that are no training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def drawing(chunks: Sequence[Sequence[int]], unit: str) -> Iterator[Sequence[int]]:
    """The same chunks of samples, behind a bar with their rate and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sample"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())  # fmt: skip
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sample", total=sum(map(len, chunks)), rate="")
        done = 0
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            progress.update(task, completed=done, rate=f"{done / (time.monotonic() - started):.2f} {unit}/s")


@contextmanager
def counted(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many of ``total`` are done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
