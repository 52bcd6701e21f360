"""Where a command computes."""

from __future__ import annotations

import os

import torch

from tessella.distributed import device_of
from tessella.errors import ConfigError


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; without a name the accelerator there is, or the CPU.

    Of several of a kind each process that torchrun starts takes its own.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if "LOCAL_RANK" in os.environ:
        name = device_of(name, int(os.environ["LOCAL_RANK"]))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return device
