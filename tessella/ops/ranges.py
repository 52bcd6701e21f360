"""Whether whole numbers are what they stand for, asked so that no training step waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_range(values: Tensor, size: int, what: str, hint: str = "") -> None:
    """Refuse ``values`` outside ``[0, size)``.

    They are looked at where that is free, on a CPU, and where somebody asks for an answer, without gradients. In a
    training step on CUDA the device checks them itself and stops the program at its next answer; a compiled graph,
    which cannot branch on values, takes them as they are.

    Args:
        values: integers of any shape.
        size: how many values there are.
        what: they are called in the message, a plural.
        hint: what follows the message.

    Raises:
        ValueError: one is outside.
    """
    if torch.compiler.is_compiling() or not values.numel():
        return
    accepted = f"{what} must lie in [0, {size})"
    if values.device.type == "cuda" and torch.is_grad_enabled():
        torch._assert_async(((values >= 0) & (values < size)).all(), f"{accepted}{hint}")
        return
    low, high = values.aminmax()
    if low < 0 or high >= size:
        raise ValueError(f"{accepted}, got {low.item()} .. {high.item()}{hint}")
