"""Colour from grey: the picture's own luma as its context."""

from __future__ import annotations

import torch
from torch import Tensor

# Rec. 601 luma, as Pillow's mode "L" and JPEG have it.
_LUMA = (0.299, 0.587, 0.114)


def to_grey(x: Tensor) -> Tensor:
    """The luma of ``x [..., 3, H, W]`` in [-1, 1] three times over; of a grey picture itself.

    Raises:
        ValueError: not three channels.
    """
    if x.ndim < 3 or x.shape[-3] != 3:
        raise ValueError(f"a picture must be [..., 3, H, W], got {list(x.shape)}")
    luma = (x * torch.tensor(_LUMA, dtype=x.dtype, device=x.device)[:, None, None]).sum(-3, keepdim=True)
    return luma.clamp(-1, 1).expand_as(x).contiguous()
