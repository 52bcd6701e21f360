"""Encoded picture to pixels: every mode Pillow can open, and more, or one exception that names picture and reason."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tessella.data._deep import is_deep_png, read_deep_png, read_npy, read_tiff
from tessella.data._encoded import FORMATS, read_encoded
from tessella.data._errors import UnreadableImage
from tessella.data._pixels import MODES, Array, BitDepth, Pixels, fit, oriented
from tessella.data._timing import timed

# More pixels than this are refused from the header alone, before memory is spent on them. It is Pillow's own limit,
# stated here because an application may have changed that one.
MAX_PIXELS = 89_478_485

# Formats whose first frame is the whole picture: a phone's JPEG with a preview inside.
_FIRST_FRAME_IS_WHOLE = {"MPO"}

_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _EXIF_ORIENTATION, _TIFF_SAMPLES = 258, 262, 274, 277
_NPY = ".npy"


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened with it; AVIF only where Pillow was built with it."""
    Image.init()
    return tuple(name for name in (*FORMATS, "MPO") if name in Image.OPEN)


@cache
def picture_extensions(channels: int = 3, bit_depth: BitDepth = 8) -> frozenset[str]:
    """The file name endings of pictures: lower case, with the dot.

    ``.npy`` is one of them where other pixels than RGB of eight bits are asked for; beside ordinary pictures such files
    hold features.
    """
    formats = set(picture_formats())
    endings = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    return frozenset(endings if (channels, bit_depth) == (3, 8) else endings | {_NPY})


def decode_rgb(source: bytes | str | os.PathLike[str], key: str) -> Image.Image:
    """The picture in ``source`` as 8-bit RGB: see :func:`decode`."""
    return cast(Image.Image, decode(source, key))


@timed("decode")
def decode(source: bytes | str | os.PathLike[str], key: str, *, channels: int = 3, bit_depth: BitDepth = 8) -> Pixels:
    """The picture in ``source`` (encoded bytes, or a file's path): JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000,
    binary PNM or .npy.

    The EXIF rotation is applied. Colour profiles are not interpreted. Animations, and files of several pages, are
    refused, since no one of their frames is the picture; save TIFFs whose pages' samples are the channels asked for.

    Grey becomes three equal colours, and colours become grey by ITU-R 601-2. Transparency, in whatever form, is
    composited on white where no alpha is asked for (1 or 3 channels); where it is (4), pictures without are opaque. Two
    channels are grey and alpha, or two planes; any other number are planes of a TIFF or an .npy. Levels of 16 (or 12)
    bits are scaled by their full range, so that white stays white: v * 255 / 65535. Of 16-bit colours in a PNG, eight
    bits are their first ones.

    Args:
        source: the encoded picture.
        key: its name in messages.
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number of planes.
        bit_depth: 16 keeps the 16 bits of PNG, TIFF, .npy and of other formats' grey; levels of 8 bits become v * 257.

    Returns:
        A Pillow image (L, RGB, RGBA) of 8 bits and 1, 3 or 4 channels, else an array ``[H, W, C]`` uint8 or uint16.

    Raises:
        ImportError: a TIFF of many samples, pages, or 16-bit colours, and tifffile is not installed.
        UnreadableImage: no regular file, or one of more than
            :data:`~tessella.data._encoded.MAX_FILE_BYTES`; not a picture, truncated, animated, of more than
            :data:`MAX_PIXELS` pixels, of a kind of pixel with no defined range (32-bit integers, floats), or one whose
            channels are not those asked for.
    """
    data, kind = read_encoded(source, key)
    with _reasons(key):
        if kind == "NPY":
            return fit(read_npy(data, channels, MAX_PIXELS, key), channels, bit_depth, alpha=False, key=key)
        plain = bit_depth == 8 and channels in MODES
        if kind == "TIFF" and _wants_tifffile(data, channels, plain=plain):
            pixels, alpha = read_tiff(data, channels, MAX_PIXELS, key)
            return fit(pixels, channels, bit_depth, alpha=alpha, key=key)
        with Image.open(io.BytesIO(data), formats=picture_formats()) as image:
            _check_header(image, key)
            if plain:
                ImageOps.exif_transpose(image, in_place=True)
                return _to_mode(image, MODES[channels], key)
            pixels, alpha = _to_array(image, data, key)
        return fit(pixels, channels, bit_depth, alpha=alpha, key=key)


@contextmanager
def _reasons(key: str) -> Iterator[None]:
    """Whatever a damaged file makes a reader raise becomes the reason why it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged metadata, such as EXIF, leaves the pixels intact
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is enforced from the header
            yield
    except (UnreadableImage, MemoryError, ImportError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(key, "not a picture in any format that can be read, or a damaged one") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(key, f"more than the limit of {MAX_PIXELS} pixels") from error
    except Exception as error:  # on damaged files the readers raise nearly every type there is
        raise UnreadableImage(key, str(error) or type(error).__name__) from error


def _check_header(image: Image.Image, key: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(key, f"{width}x{height} px is more than the limit of {MAX_PIXELS} pixels")
    if getattr(image, "is_animated", False) and image.format not in _FIRST_FRAME_IS_WHOLE:
        raise UnreadableImage(key, f"{image.format} with several frames; only still pictures are accepted")


def _to_mode(image: Image.Image, mode: str, key: str) -> Image.Image:
    """An opened file as a picture of its own in L, RGB or RGBA."""
    if _is_deep_grey(image):
        levels = _full_range(image, getattr(image, "tag_v2", {}), 255)
        image = Image.fromarray(levels.astype(np.uint8))
    _check_mode(image, key)
    if mode != "RGBA" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba).convert("RGB")
    if mode == "L" and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # a palette's or CMYK's colours first
    return image.convert(mode)


def _to_array(image: Image.Image, data: bytes, key: str) -> tuple[Array, bool]:
    """The channels that the picture has, at the depth that it has, and whether the last one is alpha."""
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if image.format == "PNG" and is_deep_png(data):
        pixels, alpha = read_deep_png(data, image.info.get("transparency"))
        return oriented(pixels, orientation), alpha
    image.load()
    if _is_deep_grey(image):
        levels = _full_range(image, getattr(image, "tag_v2", {}), 65535).astype(np.uint16)
        return oriented(levels[:, :, None], orientation), False
    _check_mode(image, key)
    alpha = image.has_transparency_data
    colours = "L" if image.mode in ("1", "L", "LA") else "RGB"
    pixels = np.asarray(image.convert(colours + "A" * alpha))
    return oriented(pixels.reshape(*pixels.shape[:2], -1), orientation), alpha


def _check_mode(image: Image.Image, key: str) -> None:
    if image.mode in ("I", "F"):
        raise UnreadableImage(key, f"pixels of mode {image.mode} have no defined range; convert to 8 or 16 bits")


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _full_range(image: Image.Image, tags: Mapping[int, Any], white: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A single channel of 12 or 16 bits: round(v * white / largest)."""
    largest = 2 ** tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] - 1
    levels = np.asarray(image).astype(np.float64) * (white / largest)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # "white is zero"
        levels = white - levels
    rounded: np.ndarray[Any, np.dtype[np.float64]] = np.rint(levels)
    return rounded


def _wants_tifffile(data: bytes, channels: int, *, plain: bool) -> bool:
    """Whether a TIFF holds what Pillow would refuse or cut: planes in samples or pages, and colours of 16 bits."""
    if plain and channels != 4:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            tags: Mapping[int, Any] = image.tag_v2  # type: ignore[attr-defined]
            if getattr(image, "n_frames", 1) > 1 or tags.get(_TIFF_SAMPLES, 1) != len(image.getbands()):
                return True
            deep = max(tags.get(_TIFF_BITS_PER_SAMPLE, (1,))) > 8
            return image.mode == "RGBX" or (deep and not plain and not image.mode.startswith("I;16"))
    except UnidentifiedImageError:
        return True
