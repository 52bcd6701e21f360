"""What is done to pixels: Pillow's pictures, and arrays of any number of channels and of 16 bits."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from tessella.data._errors import UnreadableImage

Array: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[Any]]  # [H, W, C] uint8 or uint16

# A picture of 8 bits and 1, 3 or 4 channels is Pillow's, any other one an array.
Pixels: TypeAlias = Image.Image | Array
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

BitDepth = Literal[8, 16]

# ITU-R 601-2: what Pillow makes grey of colours by.
_LUMA = np.array([0.299, 0.587, 0.114])


def size_of(pixels: Pixels) -> tuple[int, int]:
    """Width and height."""
    return pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])


def to_tensor(pixels: Pixels) -> Tensor:
    """``[C, H, W]`` float32 in [-1, 1]: v / 127.5 - 1 of 8-bit levels v, v / 32767.5 - 1 of 16-bit ones."""
    # In numpy, hence in one thread: torch would wait for threads that a busy machine lets start late.
    values = np.asarray(pixels)
    half = np.float32(32767.5 if values.dtype == np.uint16 else 127.5)
    levels = values.reshape(*values.shape[:2], -1).transpose(2, 0, 1).astype(np.float32, order="C")
    levels /= half
    levels -= np.float32(1)
    return torch.from_numpy(levels)


def resize_shorter_side(pixels: Pixels, size: int) -> Pixels:
    """Bicubic and antialiased, until the shorter side is ``size`` pixels long."""
    own = size_of(pixels)
    width, height = (max(size, round(side * size / min(own))) for side in own)
    if isinstance(pixels, Image.Image):
        return pixels.resize((width, height), Image.Resampling.BICUBIC)
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
    resized = interpolate(planes, (height, width), mode="bicubic", antialias=True)
    largest = float(np.iinfo(pixels.dtype).max)
    return resized[0].clamp(0, largest).round().permute(1, 2, 0).numpy().astype(pixels.dtype)


def crop(pixels: Pixels, size: int, key: str, rng: np.random.Generator | None) -> Pixels:
    """A square of ``size`` pixels: by ``rng``, or at the centre without one.

    Raises:
        UnreadableImage: the picture ``key`` is smaller.
    """
    width, height = size_of(pixels)
    room_x, room_y = width - size, height - size
    if rng is None and room_x == room_y == 0:
        return pixels
    if min(room_x, room_y) < 0:
        raise UnreadableImage(
            key, f"{width}x{height} px is smaller than crop_px={size}; resize_px={size} would enlarge it"
        )
    left, top = (room_x // 2, room_y // 2) if rng is None else rng.integers((0, 0), (room_x, room_y), endpoint=True)
    if isinstance(pixels, Image.Image):
        return pixels.crop((left, top, left + size, top + size))
    return pixels[top : top + size, left : left + size]


def mirror(pixels: Pixels) -> Pixels:
    """Left to right."""
    return ImageOps.mirror(pixels) if isinstance(pixels, Image.Image) else pixels[:, ::-1]


def oriented(pixels: Array, orientation: int) -> Array:
    """As EXIF says that the picture is to be shown; 1, and what it does not define, leave it."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def fit(pixels: Array, channels: int, bit_depth: BitDepth, *, alpha: bool, key: str) -> Pixels:
    """The picture with the channels and the bit depth that are asked for.

    Levels are scaled by the full range of their type: v * 257, or round(v / 257). A picture that has the channels asked
    for keeps them. Colours become grey by ITU-R 601-2, and grey becomes three equal colours. Where alpha is not asked
    for, it is composited on white; where it is, and there is none, it is opaque.

    Args:
        pixels: ``[H, W, C]`` uint8 or uint16.
        channels: those wanted.
        bit_depth: the one wanted.
        alpha: whether the last channel is one.
        key: the picture's name in messages.

    Raises:
        UnreadableImage: such channels cannot be made of these.
    """
    own = pixels.shape[2]
    if own != channels:
        colours = own - alpha
        if colours not in (1, 3) or channels not in MODES:
            raise UnreadableImage(key, f"it has {own} channels, {channels} are asked for")
        pixels = _convert(pixels, channels, alpha=alpha)
    if bit_depth == 16 and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    elif bit_depth == 8 and pixels.dtype == np.uint16:
        pixels = np.rint(pixels / 257).astype(np.uint8)
    if bit_depth == 8 and channels in MODES:
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))
    return pixels


def _convert(pixels: Array, channels: int, *, alpha: bool) -> Array:
    """Between grey, colours and colours with alpha."""
    largest = np.iinfo(pixels.dtype).max
    colours = pixels[:, :, :-1] if alpha else pixels
    opacity = pixels[:, :, -1:] if alpha else np.full_like(pixels[:, :, :1], largest)
    if channels == 4:
        return np.concatenate([np.broadcast_to(colours, (*colours.shape[:2], 3)), opacity], 2)
    values = colours.astype(np.float64)
    if alpha:
        share = opacity / largest
        values = values * share + largest * (1 - share)
    if channels == 1 and values.shape[2] == 3:
        values = values @ _LUMA[:, None]
    return np.broadcast_to(np.rint(values).astype(pixels.dtype), (*values.shape[:2], channels))
