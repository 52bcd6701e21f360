"""What processes of the package agree on: they end with the program that started them, and keep the memory they had."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 32 * 2**20  # glibc takes no larger one
_MOST_KEPT_BYTES = 2**31 - 1
_LOOK_EVERY_S = 1.0


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let this process be ended as soon as its parent is.

    Asking the operating system who the parent is would be too late: between a process's start and its first look its
    parent may have been killed, and init have taken it in. So the parent says who it is.

    Args:
        parent: process number, as the parent itself knew it.
        number: the signal that ends it on Linux; elsewhere it just ends.
    """
    if sys.platform == "linux":
        # The kernel's own promise. It holds from here on; what happened before, the look below finds out.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)
    if sys.platform != "linux":
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def leave_signals_to_parent() -> None:
    """Ignore SIGINT and SIGTERM, which reach a whole group of processes: the program ends its step and saves first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for what is allocated next, instead of giving it back to the system at once.

    A network on a CPU frees and asks for the same few megabytes in every layer, and by default each time the system
    takes them and hands out others page by page, zeroed: a fifth to a third of the time of encoding 32 x 32 pictures.
    Blocks of up to 32 MB are kept, 2 GB at most; the peak is what it was, but it stays. For a program's start: what has
    been allocated before stays as it is. Does nothing under another C library, or where the environment already says
    how glibc is to allocate.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
