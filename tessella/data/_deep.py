"""Pictures that Pillow has no mode for: arrays, TIFF of many samples or pages, PNG of 16-bit colours."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tessella.data._errors import UnreadableImage
from tessella.data._pixels import Array, oriented
from tessella.extras import require

_EXIF_ORIENTATION = 274
_KINDS = (np.dtype(np.uint8), np.dtype(np.uint16))
_GREY_AND_ALPHA, _COLOURS_AND_ALPHA = 4, 6  # PNG's colour types
_IHDR_END = 33


def read_npy(data: bytes, channels: int, max_pixels: int, key: str) -> Array:
    """``[H, W, C]`` of an .npy file.

    It holds ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` of uint8 or uint16: the channels are the last axis where its
    length is the number asked for, else the first where that one's is, else the last.

    Raises:
        UnreadableImage: something else.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
    if read_header is None:
        raise UnreadableImage(key, f".npy of version {version[0]}")
    shape, is_fortran, kind = read_header(stream)
    if kind.newbyteorder("=") not in _KINDS:
        raise UnreadableImage(key, f"values of type {kind} have no defined range; accepted are uint8 and uint16")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UnreadableImage(key, f"an array {list(shape)} is no picture; accepted are [H, W], [H, W, C], [C, H, W]")
    missing = math.prod(shape) * kind.itemsize - (len(data) - stream.tell())
    if missing > 0:
        raise UnreadableImage(key, f"truncated: {missing} bytes are missing")
    # Not np.load: it sets as much memory aside as the header asks for, whatever follows.
    flat = np.frombuffer(data, kind, math.prod(shape), stream.tell())
    values: np.ndarray[Any, Any] = flat.reshape(shape, order="F" if is_fortran else "C")
    values = values.astype(kind.newbyteorder("="))
    if values.ndim == 2:
        values = values[:, :, None]
    elif values.shape[2] != channels and values.shape[0] == channels:
        values = values.transpose(1, 2, 0)
    height, width, _ = values.shape
    _check_pixels(width, height, max_pixels, key)
    return values


def read_tiff(data: bytes, channels: int, max_pixels: int, key: str) -> tuple[Array, bool]:
    """``[H, W, C]`` of a TIFF file, and whether the last channel is alpha.

    The samples of its pages follow each other as channels; all pages must be of one size and kind.

    Raises:
        ImportError: tifffile is not installed.
        UnreadableImage: other pixels than unsigned integers of at most 16 bits, pages that differ, or more samples in
            all than the channels asked for in several pages.
    """
    with require("tifffile", extra="data").TiffFile(io.BytesIO(data)) as file:
        first, num_pages = file.pages[0], len(file.pages)
        if first.photometric.name == "PALETTE":
            raise UnreadableImage(key, "a palette of 16 bits, or in several pages")
        samples = num_pages * first.samplesperpixel
        if num_pages > 1 and samples != channels:
            raise UnreadableImage(key, f"it has {num_pages} pages, {samples} channels; {channels} are asked for")
        _check_pixels(first.imagewidth, first.imagelength, max_pixels, key)
        if first.imagedepth != 1:
            raise UnreadableImage(key, "a volume, not a picture")
        planes = [_tiff_page(page, first, key) for page in file.pages]
        alpha = num_pages == 1 and bool(first.extrasamples) and first.extrasamples[-1] != 0
        orientation = first.tags.valueof(_EXIF_ORIENTATION, 1)
    return oriented(np.concatenate(planes, 2), int(orientation)), alpha


def _tiff_page(page: Any, first: Any, key: str) -> Array:
    """``[H, W, S]``, scaled to the full range of its type."""
    if page.dtype not in _KINDS:
        raise UnreadableImage(key, f"pixels of type {page.dtype} have no defined range; convert to 8 or 16 bits")
    same = ("imagewidth", "imagelength", "imagedepth", "samplesperpixel", "dtype", "bitspersample", "photometric")
    if any(getattr(page, name) != getattr(first, name) for name in same):
        raise UnreadableImage(key, "its pages are of different sizes or kinds")
    values: np.ndarray[Any, Any] = page.asarray().reshape(page.shape)
    if values.ndim == 2:
        values = values[:, :, None]
    elif page.planarconfig == 2:  # plane after plane
        values = values.transpose(1, 2, 0)
    bits, full = page.bitspersample, 8 * page.dtype.itemsize
    if bits < full:
        values = np.rint(values * ((2**full - 1) / (2**bits - 1))).astype(page.dtype)
    if page.photometric.name == "MINISWHITE":
        values = np.iinfo(page.dtype).max - values
    return values


def is_deep_png(data: bytes) -> bool:
    """Whether it is a PNG of 16-bit colours or 16-bit grey with alpha, of which Pillow keeps eight bits."""
    return data[24] == 16 and data[25] != 0


def read_deep_png(data: bytes, transparent: tuple[int, ...] | None) -> tuple[Array, bool]:
    """``[H, W, C]`` uint16 of a PNG that :func:`is_deep_png`, and whether the last channel is alpha.

    Args:
        data: the file, whose header has been checked.
        transparent: the one colour that is transparent, if there is one.
    """
    if data[25] == _GREY_AND_ALPHA:
        # Two values of two bytes are filtered as four of one byte are: as RGBA it is decoded to the same bytes.
        header = data[12:24] + bytes([8, _COLOURS_AND_ALPHA]) + data[26:29]
        as_bytes = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[_IHDR_END:]
        with Image.open(io.BytesIO(as_bytes), formats=("PNG",)) as image:
            return np.asarray(image).view(">u2").astype(np.uint16), True
    # Pillow keeps the first byte of each value, and believes the file's word which of the two comes first.
    high, low = (_one_byte_of_two(data, order) for order in "BL")
    pixels = high.astype(np.uint16) << 8 | low
    if transparent is not None:
        opacity = (pixels != np.array(transparent)).any(2, keepdims=True) * np.uint16(65535)
        return np.concatenate([pixels, opacity], 2), True
    return pixels, data[25] == _COLOURS_AND_ALPHA


def _one_byte_of_two(data: bytes, order: str) -> Array:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        (tile,) = image.tile
        image.tile = [tile._replace(args=f"{image.mode};16{order}")]
        image.load()
        return np.asarray(image)


def _check_pixels(width: int, height: int, max_pixels: int, key: str) -> None:
    if width * height > max_pixels:
        raise UnreadableImage(key, f"{width}x{height} px is more than the limit of {max_pixels} pixels")
