from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.config import build
from tessella.data import decode as decode_module
from tessella.data._pixels import oriented, resize_shorter_side
from tessella.data.base import UnreadableImage, to_tensor
from tessella.data.decode import decode, picture_extensions
from tessella.data.folder import Folder
from tessella.data.loader import evaluation_batches, training_batches
from tessella.media.image import Image as ImageMedium

WHITE = 65535


def noise(height: int, width: int, channels: int, kind: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(kind).max, (height, width, channels), dtype=kind, endpoint=True)


def deep_png(pixels: np.ndarray, *, interlaced: bool = False, more: bytes = b"") -> bytes:
    """A PNG of 16 bits with 1 to 4 channels, written out; ``more`` are chunks before the pixels."""
    height, width, channels = pixels.shape
    colours = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    # The passes of an interlaced file: start and step of its rows, and of its columns.
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    parts = [pixels[a::b, c::d] for a, b, c, d in passes] if interlaced else [pixels]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts if part.size for row in part)
    head = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, int(interlaced))
    body = chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def levels(data: bytes, **options: Any) -> list:
    return np.asarray(decode(data, "picture", **options)).tolist()


@pytest.mark.parametrize(
    ("mode", "pixel", "channels", "expected"),
    [
        ("RGB", (100, 50, 200), 1, 82),  # (100 * 299 + 50 * 587 + 200 * 114) / 1000 = 82.05
        ("RGB", (100, 50, 200), 4, [100, 50, 200, 255]),
        ("L", 77, 1, 77),
        ("L", 77, 4, [77, 77, 77, 255]),
        ("RGBA", (100, 0, 200, 51), 4, [100, 0, 200, 51]),
        ("RGBA", (100, 100, 100, 51), 1, 224),  # 100/5 + 255 * 4/5
        ("LA", (0, 51), 1, 204),
        ("LA", (0, 51), 4, [0, 0, 0, 51]),
    ],
)
def test_grey_colours_and_alpha_in_8_bits(mode: str, pixel: Any, channels: int, expected: Any) -> None:
    assert levels(png(Image.new(mode, (1, 1), pixel)), channels=channels) == [[expected]]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_every_bit(channels: int, interlaced: bool) -> None:
    pixels = noise(9, 11, channels, np.uint16)
    decoded = decode(deep_png(pixels, interlaced=interlaced), "picture", channels=channels, bit_depth=16)
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded, pixels)


def test_16_bit_pixels_between_channels() -> None:
    colours = np.array([[[10_000, 20_000, 60_000]]], np.uint16)
    assert levels(deep_png(colours), channels=4, bit_depth=16) == [[[10_000, 20_000, 60_000, WHITE]]]
    # .299 * 10000 + .587 * 20000 + .114 * 60000
    assert levels(deep_png(colours), channels=1, bit_depth=16) == [[[21_570]]]
    third = np.array([[[9000, 21_845]]], np.uint16)  # a third opaque: 9000 / 3 + 65535 * 2 / 3
    assert levels(deep_png(third), channels=3, bit_depth=16) == [[[46_690] * 3]]
    assert levels(png(Image.new("RGB", (1, 1), (1, 2, 255))), bit_depth=16) == [[[257, 514, WHITE]]]


def test_the_transparent_colour_of_a_16_bit_png_is_white() -> None:
    pixels = np.array([[[1, 2, 3], [1, 2, 4]]], np.uint16)
    data = deep_png(pixels, more=chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert levels(data, bit_depth=16) == [[[WHITE] * 3, [1, 2, 4]]]
    assert levels(data, channels=4, bit_depth=16) == [[[1, 2, 3, 0], [1, 2, 4, WHITE]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_arrays_are_turned_as_pillow_turns_pictures(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(4, 6, 3)
    turned = decode(png(Image.fromarray(pixels), exif=exif), "picture")
    np.testing.assert_array_equal(oriented(pixels, orientation), np.asarray(turned))
    deep = decode(png(Image.fromarray(pixels), exif=exif), "picture", bit_depth=16)
    np.testing.assert_array_equal(deep, np.asarray(turned).astype(np.uint16) * 257)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ((4, 6, 5), {"photometric": "minisblack", "planarconfig": "contig"}),
        ((5, 4, 6), {"photometric": "minisblack", "planarconfig": "separate"}),
        ((5, 4, 6), {"photometric": "minisblack", "compression": "zlib"}),  # five pages
    ],
)
def test_tiff_of_many_channels(layout: tuple[int, ...], options: dict[str, Any], kind: type) -> None:
    pixels = noise(*layout, kind)
    data = tiff(pixels, **options)
    expected = pixels if layout == (4, 6, 5) else pixels.transpose(1, 2, 0)
    decoded = decode(data, "picture", channels=5, bit_depth=8 * pixels.itemsize)
    assert decoded.dtype == kind
    np.testing.assert_array_equal(decoded, expected)
    with pytest.raises(UnreadableImage, match=r"picture: .* (5 channels|in any format|frames)"):
        decode(data, "picture", channels=3)


def test_tiff_of_16_bit_colours_and_of_four_planes() -> None:
    pixels = noise(3, 4, 3, np.uint16)
    np.testing.assert_array_equal(decode(tiff(pixels, photometric="rgb"), "picture", bit_depth=16), pixels)
    planes = noise(3, 4, 4)  # near infrared, say: no alpha
    data = tiff(planes, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(np.asarray(decode(data, "picture", channels=4)), planes)


def test_tiff_where_white_is_zero_and_pages_that_differ() -> None:
    pixels = np.array([[0, WHITE, 300]], np.uint16)
    assert levels(tiff(pixels, photometric="miniswhite"), channels=1, bit_depth=16) == [[[WHITE], [0], [65_235]]]
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(noise(4, 4, 1)[:, :, 0])
        writer.write(noise(4, 5, 1)[:, :, 0])
    with pytest.raises(UnreadableImage, match="its pages are of different sizes or kinds"):
        decode(buffer.getvalue(), "picture", channels=2)
    with pytest.raises(UnreadableImage, match="float32 have no defined range"):
        decode(tiff(np.zeros((5, 4, 4), np.float32), photometric="minisblack"), "picture", channels=5)


def test_npy_says_its_channels_by_its_shape() -> None:
    pixels = noise(4, 6, 5, np.uint16)
    for values in (pixels, pixels.transpose(2, 0, 1), pixels.astype(">u2"), np.asfortranarray(pixels)):
        np.testing.assert_array_equal(decode(npy(values), "picture", channels=5, bit_depth=16), pixels)
    square = noise(5, 6, 5)  # [H, W, C] where both could be
    np.testing.assert_array_equal(decode(npy(square), "picture", channels=5), square)
    np.testing.assert_array_equal(
        decode(npy(noise(4, 6, 1)[:, :, 0]), "p", channels=1, bit_depth=16) // 257, noise(4, 6, 1)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.zeros((4, 4, 3), np.float32),
            "values of type float32 have no defined range; accepted are uint8 and uint16",
        ),
        (np.zeros((2, 4, 4, 3), np.uint8), r"an array \[2, 4, 4, 3\] is no picture; accepted are \[H, W\]"),
        (np.zeros((0, 4, 3), np.uint8), r"an array \[0, 4, 3\] is no picture"),
        (np.zeros((4, 4, 7), np.uint8), "it has 7 channels, 5 are asked for"),
        (np.array([[object()]]), "values of type object have no defined range"),
    ],
)
def test_npy_that_is_no_picture(values: np.ndarray, message: str) -> None:
    with pytest.raises(UnreadableImage, match=message):
        decode(npy(values), "picture", channels=5)


def test_an_array_is_limited_by_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 23)
    for data in (npy(noise(4, 6, 5)), tiff(noise(4, 6, 5), photometric="minisblack", planarconfig="contig")):
        with pytest.raises(UnreadableImage, match="6x4 px is more than the limit of 23 pixels"):
            decode(data, "picture", channels=5)


def test_a_damaged_array_raises_nothing_else() -> None:
    whole = [npy(noise(4, 6, 5)), tiff(noise(4, 6, 5), photometric="minisblack", planarconfig="contig")]
    rng = np.random.default_rng(0)
    refused = 0
    for data in whole:
        for _ in range(150):
            damaged = bytearray(data)
            damaged[rng.integers(8, len(data))] = rng.integers(256)
            for candidate in (bytes(damaged), data[: rng.integers(len(data))]):
                try:
                    decode(candidate, "picture", channels=5)
                except UnreadableImage:
                    refused += 1
    assert refused > 200


def test_without_tifffile_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(noise(4, 6, 5), photometric="minisblack", planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"tifffile is needed .* pip install 'tessella\[data\]'"):
        decode(data, "picture", channels=5)


def test_levels_of_16_bits_map_to_minus_one_and_one() -> None:
    x = to_tensor(np.array([[[0, 32_768, WHITE]]], np.uint16))
    assert x.shape == (3, 1, 1)
    assert x.flatten().tolist() == pytest.approx([-1, 1 / WHITE, 1], abs=1e-7)
    assert (x.min(), x.max()) == (-1, 1)


@pytest.mark.parametrize("size", [(40, 30), (9, 17)])
def test_arrays_are_resized_as_pillow_resizes(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    # Away from black and white: Pillow cuts what overshoots them after each of its two passes, not only at the end.
    small = Image.fromarray(rng.integers(80, 176, (6, 8, 3), dtype=np.uint8))
    picture = small.resize(size, Image.Resampling.BICUBIC)
    ours = resize_shorter_side(np.asarray(picture), 12).astype(np.int64)
    theirs = np.asarray(resize_shorter_side(picture, 12)).astype(np.int64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1


def write_planes(folder: Path, count: int, channels: int) -> np.ndarray:
    """Files 0.npy, ...: plane c of picture i is i * 16 + c everywhere, but for a corner of 65535."""
    planes = np.stack([np.full((6, 8, channels), 16 * i, np.uint16) + np.arange(channels) for i in range(count)])
    planes = planes.astype(np.uint16)
    planes[:, 0, 0] = WHITE
    folder.mkdir(parents=True, exist_ok=True)
    for index, values in enumerate(planes):
        np.save(folder / f"{index}.npy", values)
    return planes


def test_a_folder_of_six_channels(tmp_path: Path) -> None:
    planes = write_planes(tmp_path / "test", 4, 6)
    spec = {"name": "folder", "path": str(tmp_path), "channels": 6, "bit_depth": 16, "crop_px": 4, "flip": True}
    dataset = build("data", spec, split="test")
    (batch,) = evaluation_batches(dataset, batch_size=4)
    assert batch["x"].shape == (4, 6, 4, 4)
    expected = planes[:, 1:5, 2:6].transpose(0, 3, 1, 2) / 32767.5 - 1
    np.testing.assert_allclose(batch["x"].double().numpy(), expected, atol=1e-7)
    crops = torch.cat([next(training_batches(dataset, batch_size=4, seed=seed))["x"] for seed in range(30)])
    corners = (crops[:, 0] == 1).flatten(1).nonzero()[:, 1]
    assert set(corners.tolist()) == {0, 3}  # the file's first pixel at a crop's left, and mirrored at its right
    assert type(dataset).medium_spec(spec) == {"name": "image", "channels": 6, "bit_depth": 16}


def test_npy_beside_ordinary_pictures_is_not_theirs(tmp_path: Path) -> None:
    write_planes(tmp_path / "test", 2, 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "test" / "a.png")
    assert len(Folder(tmp_path, split="test")) == 1
    assert len(Folder(tmp_path, split="test", bit_depth=16)) == 3
    assert picture_extensions(1) - picture_extensions() == {".npy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"channels": 0}, "channels must be at least 1, got 0"), ({"bit_depth": 12}, "bit_depth must be 8 or 16, got 12")],
)
def test_channels_and_depth_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path, split="test", **options)


@pytest.mark.parametrize(("channels", "bit_depth"), [(1, 8), (3, 8), (4, 8), (2, 8), (6, 8), (1, 16), (3, 16), (6, 16)])
def test_the_medium_reads_what_it_writes(tmp_path: Path, channels: int, bit_depth: Any) -> None:
    medium = ImageMedium(channels=channels, bit_depth=bit_depth)
    x = to_tensor(noise(5, 7, channels, np.uint8 if bit_depth == 8 else np.uint16))
    file = tmp_path / f"a{medium.suffix}"
    medium.write(x, file)
    torch.testing.assert_close(medium.read(file), x, rtol=0, atol=1e-7)
