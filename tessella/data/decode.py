"""Encoded picture to 8-bit RGB: every mode Pillow can open, or one exception that names the picture and the reason."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tessella.data._errors import UnreadableImage
from tessella.data._timing import timed

# More pixels than this are refused from the header alone, before memory is spent on them. It is Pillow's own limit,
# stated here because an application may have changed that one.
MAX_PIXELS = 89_478_485

# EPS would be run by Ghostscript, a program, not a picture; the others Pillow recognises but cannot turn into pixels.
_REFUSED_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG"}

# Formats whose first frame is the whole picture: a phone's JPEG with a preview inside, a layered drawing.
_FIRST_FRAME_IS_WHOLE = {"MPO", "PSD"}

_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that :func:`decode_rgb` opens."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _REFUSED_FORMATS))


@cache
def picture_extensions() -> frozenset[str]:
    """The file name endings of those formats: lower case, with the dot."""
    formats = set(picture_formats())
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


@timed("decode")
def decode_rgb(source: bytes | str | os.PathLike[str], key: str) -> Image.Image:
    """The picture in ``source`` (encoded bytes, or a file's path) as 8-bit RGB.

    The EXIF rotation is applied. Transparency, in whatever form, is composited on white. Grey levels of 16 (or 12) bits
    are scaled by their full range, so that white stays white: v * 255 / 65535. Colour profiles are not interpreted.
    Animations and files of several pages are refused, since no one of their frames is the picture.

    Args:
        source: the encoded picture.
        key: its name in messages.

    Raises:
        UnreadableImage: not a picture, truncated, animated, of more than :data:`MAX_PIXELS` pixels, or of a kind of
            pixel with no defined range (32-bit integers, floats).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged metadata, such as EXIF, leaves the pixels intact
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is enforced just below
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            with Image.open(io.BytesIO(data), formats=picture_formats()) as image:
                _check_header(image, key)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), image, key)
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(key, "not a picture in any format that can be read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(key, f"more than the limit of {MAX_PIXELS} pixels") from error
    except Exception as error:  # on damaged files Pillow's readers raise nearly every type there is
        raise UnreadableImage(key, str(error) or type(error).__name__) from error


def _check_header(image: Image.Image, key: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(key, f"{width}x{height} px is more than the limit of {MAX_PIXELS} pixels")
    if getattr(image, "is_animated", False) and image.format not in _FIRST_FRAME_IS_WHOLE:
        raise UnreadableImage(key, f"{image.format} with several frames; only still pictures are accepted")


def _to_rgb(image: Image.Image, opened: Image.Image, key: str) -> Image.Image:
    """``image`` as RGB; ``opened`` is the file it is from, which alone knows its format and tags."""
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
        image = _grey_to_8_bits(image, getattr(opened, "tag_v2", {}))
    if image.mode in ("I", "F"):
        raise UnreadableImage(key, f"pixels of mode {image.mode} have no defined range; convert to 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Mode L from a single channel of 12 or 16 bits: round(v * 255 / largest)."""
    largest = 2 ** tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] - 1
    levels = np.asarray(image).astype(np.float64) * (255 / largest)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # "white is zero"
        levels = 255 - levels
    return Image.fromarray(np.rint(levels).astype(np.uint8))
