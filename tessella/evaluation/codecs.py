"""Yardsticks for tokenizers of pictures: what JPEG, WebP and AVIF make of as many bits."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from tessella.evaluation.image import to_uint8

CODECS = ("jpeg", "webp", "avif")
_QUALITIES = 100  # of all three, in Pillow: 0 the worst


def available_codecs() -> list[str]:
    """Those of :data:`CODECS` that this Pillow was built with."""
    return [codec for codec in CODECS if codec == "jpeg" or features.check(codec)]


def coded(x: Tensor, codec: str, budget: float) -> tuple[Tensor, int]:
    """What comes back from the best file of at most ``budget`` bits, or the smallest there is, and that file's bits.

    Args:
        x: a picture ``[3, H, W]`` in [-1, 1].
        codec: one of :func:`available_codecs`.
        budget: bits of the whole file.
    """
    picture = Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())
    low, high = 0, _QUALITIES  # the best quality lies in [low, high]
    best = _file(picture, codec, low)
    if 8 * len(best) > budget:
        return _decoded(best), 8 * len(best)
    while low < high:
        quality = math.ceil((low + high) / 2)
        data = _file(picture, codec, quality)
        if 8 * len(data) <= budget:
            low, best = quality, data
        else:
            high = quality - 1
    return _decoded(best), 8 * len(best)


def _file(picture: Image.Image, codec: str, quality: int) -> bytes:
    stream = io.BytesIO()
    extra = {"optimize": True} if codec == "jpeg" else {}
    picture.save(stream, codec.upper(), quality=quality, **extra)
    return stream.getvalue()


def _decoded(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
