"""Processes that end with the program that started them, whenever and however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
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


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
