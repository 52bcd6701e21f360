"""What a run leaves to read: ``log.jsonl``, ``train.log``, TensorBoard files, and a progress bar while it lasts."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tessella.storage import write_text
from tessella.text import printable

logger = logging.getLogger("tessella")

LOG = "log.jsonl"

_PLAIN_INTERVAL_S = 15.0  # between lines where there is no terminal to draw a bar on


class RunLog:
    """Scalars of a run, one JSON object a line, and the same to TensorBoard where it is installed (extra ``track``).

    Opening it again at step n drops the rows after n, which a continued run writes anew.

    Args:
        folder: of the run.
        position: steps that are done.
        earlier: messages that were held back until there was a log, see :func:`held_back`.
    """

    def __init__(self, folder: Path, position: int, earlier: MemoryHandler) -> None:
        self._earlier = earlier
        self._file = folder / LOG
        self._text = folder / "train.log"
        self._board_folder = folder / "tensorboard"
        self._position = position

    def __enter__(self) -> Self:
        rows = [row for row in read_log(self._file) if row["step"] <= self._position]
        write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = self._file.open("a", encoding="utf-8")
        self._handler = logging.FileHandler(self._text, encoding="utf-8")
        self._handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        self._earlier.setTarget(self._handler)
        self._earlier.flush()
        self._earlier.setTarget(None)
        logger.removeHandler(self._earlier)
        logger.addHandler(self._handler)
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._board_folder, purge_step=self._position + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()
        logger.removeHandler(self._handler)
        self._handler.close()
        if self._board is not None:
            self._board.close()

    def row(self, row: dict[str, float]) -> None:
        """Write one row; it must have ``step``."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, int(row["step"]))

    def show(self, name: str, file: Path, position: int) -> None:
        """Show a file in TensorBoard, if it is a picture."""
        if self._board is not None and file.suffix == ".png":
            self._board.add_image(name, np.asarray(Image.open(file).convert("RGB")), position, dataformats="HWC")


@contextmanager
def held_back(logger: logging.Logger) -> Iterator[MemoryHandler]:
    """Keep messages until a log takes them over: what is said before the first step belongs there too."""
    handler = MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of ``log.jsonl``.

    A last line that a killed run left half-written is dropped, and so is whatever was damaged since: a log must neither
    keep a run from going on nor a report from being made.
    """
    if not file.is_file():
        return []
    *lines, last = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [row for row in map(_row, lines) if row is not None]
    if len(rows) < len(lines):
        logger.warning("%s: %d of %d rows are damaged and dropped", file, len(lines) - len(rows), len(lines))
    if last:
        logger.warning("%s ends in half a line, which is dropped", file)
    return rows


def _row(line: str) -> dict[str, float] | None:
    """A line's row, if it is one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole and all(isinstance(value, int | float) for value in row.values()) else None


class _OneLine(logging.Formatter):
    """A message is one line, whatever the names in it are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class TrainingProgress:
    """A bar with loss, rate and time left; a line now and then where there is no terminal.

    Args:
        steps: of the whole run.
        position: those that are done.
        unit: what the rate counts.
        headline: logged metrics to show, with their units.
        quiet: show nothing.
    """

    def __init__(
        self, steps: int, position: int, *, unit: str, headline: Mapping[str, str], quiet: bool = False
    ) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._steps, self._position, self._first, self._units = steps, position, position, 0.0
        self._unit, self._headline = unit, headline
        self._row: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[rate]}"), TextColumn("left"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=steps, completed=position, loss="", rate="")

    def __enter__(self) -> Self:
        self._progress.start()
        self._started = self._spoken = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, row: dict[str, float], units: float) -> None:
        """One step over so many ``units`` is done; ``row`` is what it logged."""
        self._position += 1
        self._units += units
        row = self._row = row if len(row) > 1 else self._row  # a step whose numbers were not read shows the last ones
        now = time.monotonic()
        rate = self._units / (now - self._started)
        losses = "  ".join(f"{name.removeprefix('loss/')} {row[name]:.4f}" for name in row if name.startswith("loss/"))
        losses += "".join(f"  {row[name]:.2f} {unit}" for name, unit in self._headline.items() if name in row)
        shown = f"{rate:{'.0f' if rate >= 10 else '.2g'}} {self._unit}/s"
        self._progress.update(self._task, advance=1, loss=losses, rate=shown)
        if not self._console.is_terminal and (now - self._spoken > _PLAIN_INTERVAL_S or self._position == self._steps):
            self._spoken = now
            left = (self._steps - self._position) * (now - self._started) / (self._position - self._first)
            self._console.print(
                f"step {self._position}/{self._steps}  {losses}  {shown}  {left:.0f} s left",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
