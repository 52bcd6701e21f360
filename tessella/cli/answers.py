"""The one place that turns exceptions into answers: one readable line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from tessella.errors import EndedElsewhere, Interrupted, TessellaError
from tessella.text import printable

console = Console(soft_wrap=True, highlight=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False)

TRACEBACK = "TESSELLA_TRACEBACK"


_RANK = int(os.environ.get("RANK") or 0)  # of the processes that torchrun starts


def say(text: str, *names: object) -> None:
    """Print a line, of several ranks once; each ``{}`` of it is a name, which no markup in it can change."""
    if _RANK:
        return
    console.print(text.format(*(f"[bold]{escape(printable(str(name)))}[/bold]" for name in names)))


@contextmanager
def answers() -> Iterator[None]:
    """Expected failures end in one line and an exit status, not in a traceback.

    2 for what was refused, here or by another rank, which then says it; 128 + n for what signal n ended. With
    ``TESSELLA_TRACEBACK=1`` in the environment the traceback comes too.
    """
    try:
        yield
    except Interrupted as stop:
        if not _RANK:
            errors.print(f"{escape(str(stop))}; the same command continues from there")
        sys.exit(128 + stop.signal_number)
    except EndedElsewhere:
        sys.exit(2)  # whoever failed says why
    except KeyboardInterrupt:
        errors.print("stopped at once; what was not saved is lost")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output has left; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (TessellaError, ValueError, OSError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
        if os.environ.get(TRACEBACK) or not (_is_expected(error) or _is_memory(error)):
            raise
        where = f"rank {_RANK}: " if _RANK else ""
        errors.print(f"[red]error:[/red] {where}{escape(printable(_line(error)))}")
        sys.exit(2)


def _is_expected(error: Exception) -> bool:
    return isinstance(error, TessellaError) or not isinstance(error, RuntimeError)


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out; torch says so in a RuntimeError."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, TessellaError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _is_memory(error):
        return "not enough memory" + (f": {error}" if str(error) else "")
    return str(error) or type(error).__name__
