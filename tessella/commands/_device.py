"""Where a command computes."""

from __future__ import annotations

import torch

from tessella.errors import ConfigError


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; without a name the accelerator there is, or the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return device
