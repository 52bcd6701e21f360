"""The runner of every study: cells, each in one thread of a worker process, cheap first, resumable one by one.

A cell is a function of a folder and of settings that JSON can hold; what it returns is its row. A cell that has its
``result.json`` is not run again, and one that was interrupted goes on from the checkpoint of the run in its folder.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tessella.errors import ConfigError, Interrupted
from tessella.processes import end_with_parent, keep_freed_memory
from tessella.recipe import differences
from tessella.storage import write_text

Row = dict[str, Any]
Work = Callable[[Path, dict[str, Any]], Row]

CELLS = "cells"
_RESULT, _SETTINGS = "result.json", "settings.json"


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    Attributes:
        name: of its folder, which is the work's own.
        labels: what tells its row from others: method, size, seed.
        work: a function of a module, which another process can import; gives the row, ``seconds`` in it.
        settings: all that the row depends on.
    """

    name: str
    labels: dict[str, Any]
    work: Work
    settings: dict[str, Any]


def run_cells(cells: Sequence[Cell], out: Path, *, jobs: int | None = None) -> list[Row]:
    """Run what is missing of ``cells``, in their order, and give all rows.

    Args:
        cells: cheap ones first; later ones may read the folders of earlier ones only if these have run.
        out: folder of the study; a cell's is ``out/cells/NAME``.
        jobs: cells at a time, each on one core; all cores if None.

    Raises:
        ConfigError: a folder there holds a cell of other settings.
    """
    for cell in cells:
        _check(cell, out)
    missing = [cell for cell in cells if not (out / CELLS / cell.name / _RESULT).is_file()]
    if missing:
        _run_missing(missing, out, jobs or os.cpu_count() or 1)
    return [row for cell in cells if (row := result_of(cell, out)) is not None]


def result_of(cell: Cell, out: Path) -> Row | None:
    """The row of a cell that has run."""
    file = out / CELLS / cell.name / _RESULT
    row: Row | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return row


def _check(cell: Cell, out: Path) -> None:
    file = out / CELLS / cell.name / _SETTINGS
    if not file.is_file():
        return
    changed = differences(json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(cell.settings)))
    if changed:
        raise ConfigError(
            f"{out} holds a study with other settings ({cell.name}: {'; '.join(changed)}); choose another --out"
        )


def _run_missing(missing: list[Cell], out: Path, jobs: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("cells"), MofNCompleteColumn(), BarColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(stderr=True)
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        _terminable(),
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_worker, initargs=(os.getpid(),)) as pool,
    ):
        task = progress.add_task("cells", total=len(missing))
        futures = {pool.submit(_run, cell, out): cell for cell in missing}
        try:
            for future in as_completed(futures):
                row = future.result()
                progress.advance(task)
                console.print(f"{futures[future].name}  {row['seconds']:.0f} s", highlight=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # a cell in training writes its checkpoint first
            raise


def _run(cell: Cell, out: Path) -> Row:
    folder = out / CELLS / cell.name
    write_text(folder / _SETTINGS, json.dumps(cell.settings, indent=1) + "\n")
    try:
        measured = cell.work(folder, cell.settings)
    except Interrupted as stop:
        # Its checkpoint is written. A worker that lived on would begin the cell that already waits for it.
        os._exit(128 + stop.signal_number)
    row = {**cell.labels, **measured, "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    write_text(folder / _RESULT, json.dumps(row, indent=1) + "\n")
    return row


def _prepare_worker(parent: int) -> None:
    end_with_parent(parent)
    keep_freed_memory()
    torch.set_num_threads(1)
    logging.getLogger("tessella").setLevel(logging.WARNING)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that the processes at work end too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
