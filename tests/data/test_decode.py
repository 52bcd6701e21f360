from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessella.data.decode import MAX_PIXELS, UnreadableImage, decode_rgb, picture_extensions, picture_formats


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def decoded(data: bytes) -> np.ndarray:
    image = decode_rgb(data, "picture")
    assert image.mode == "RGB"
    return np.asarray(image)


def reason_of(data: bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode_rgb(data, "some/picture")
    assert caught.value.key == "some/picture"
    assert str(caught.value) == f"some/picture: {caught.value.reason}"
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_is_unchanged(kind: str) -> None:
    pixels = noise(5, 7)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(pixels), kind)), pixels)


def test_a_path_is_read_and_closed(tmp_path: Path) -> None:
    pixels = noise(4, 4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decode_rgb(tmp_path / "a.png", "a.png")), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_applied_once(kind: str) -> None:
    pixels = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to show"
    data = encoded(Image.fromarray(pixels), kind, exif=exif)
    np.testing.assert_array_equal(decoded(data), np.rot90(pixels, -1))


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert decoded(encoded(image, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert decoded(encoded(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    half_transparent = encoded(image, "PNG", transparency=bytes([0, 128]))
    # 200 * 128/255 + 255 * 127/255 = 227.4, and so on
    np.testing.assert_allclose(decoded(half_transparent)[0, 1], [227.4, 177.2, 152.1], atol=1)


def test_transparent_colour_of_rgb_is_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decoded(encoded(image, "PNG", transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGBA", (100, 0, 200, 255), [100, 0, 200]),
        ("RGBA", (100, 0, 200, 0), [255, 255, 255]),
        ("RGBA", (100, 0, 200, 51), [224, 204, 244]),  # v/5 + 255 * 4/5
        ("LA", (0, 51), [204, 204, 204]),
    ],
)
def test_alpha_is_composited_on_white(mode: str, pixel: tuple[int, ...], expected: list[int]) -> None:
    assert decoded(encoded(Image.new(mode, (1, 1), pixel), "PNG"))[0, 0].tolist() == expected


def test_grey_and_bilevel() -> None:
    assert decoded(encoded(Image.new("L", (1, 1), 77), "PNG"))[0, 0].tolist() == [77, 77, 77]
    assert decoded(encoded(Image.new("1", (1, 1), 1), "PNG"))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(decoded(data), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_range(kind: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535, 300]], np.uint16)
    data = encoded(Image.fromarray(levels), kind)
    assert decoded(data)[0, :, 0].tolist() == [0, 1, 128, 255, 1]  # 300 / 257 = 1.17


def tiff(width: int, bits: int, photometric: int, pixels: bytes) -> bytes:
    """A TIFF file of one row and one channel, written out."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def test_16_bit_grey_where_white_is_zero() -> None:
    assert decoded(tiff(2, 16, 0, struct.pack("<HH", 0, 65535)))[0, :, 0].tolist() == [255, 0]
    assert decoded(tiff(2, 16, 1, struct.pack("<HH", 0, 65535)))[0, :, 0].tolist() == [0, 255]


def test_12_bit_grey_is_scaled_by_its_range() -> None:
    packed = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048, most significant bits first
    assert decoded(tiff(2, 12, 1, packed))[0, :, 0].tolist() == [255, 128]  # 2048 * 255 / 4095 = 127.53


@pytest.mark.parametrize(("mode", "kind"), [("I", "TIFF"), ("F", "TIFF")])
def test_pixels_without_a_range_are_refused(mode: str, kind: str) -> None:
    assert "no defined range" in reason_of(encoded(Image.new(mode, (2, 2)), kind))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert reason_of(data) == f"{kind} with several frames; only still pictures are accepted"


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_one_frame_is_a_picture(kind: str) -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), kind, save_all=True)
    np.testing.assert_allclose(decoded(data)[0, 0], [255, 0, 0], atol=3)


def test_a_phone_picture_with_a_preview_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decoded(data)[0, 0], [255, 0, 0], atol=3)


def test_text_named_as_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UnreadableImage, match=r"^a\.png: not a picture in any format that can be read \(JPEG, PNG, "):
        decode_rgb(tmp_path / "a.png", "a.png")


def test_missing_file_and_no_bytes(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        decode_rgb(tmp_path / "a.png", "a.png")
    assert "not a picture" in reason_of(b"")


def test_postscript_is_never_run() -> None:
    assert "EPS" not in picture_formats()
    assert ".eps" not in picture_extensions()
    assert "not a picture" in reason_of(encoded(Image.new("RGB", (2, 2)), "EPS"))


def test_extensions_name_readable_formats() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= picture_extensions()
    assert not {".pdf", ".mpeg", ".h5", ".txt"} & picture_extensions()


WHOLE = {
    "JPEG": encoded(Image.fromarray(noise(40, 40)), "JPEG"),
    "PNG": encoded(Image.fromarray(noise(40, 40)), "PNG"),
    "WEBP": encoded(Image.fromarray(noise(40, 40)), "WEBP", lossless=True),
    "BMP": encoded(Image.fromarray(noise(40, 40)), "BMP"),
    "TIFF": encoded(Image.fromarray(noise(40, 40)), "TIFF", compression="tiff_lzw"),
    "GIF": encoded(Image.fromarray(noise(40, 40)[:, :, 0]), "GIF"),
}


@pytest.mark.parametrize("kind", sorted(WHOLE))
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_picture_is_refused_or_whole(kind: str, share: float) -> None:
    data = WHOLE[kind]
    try:
        pixels = decoded(data[: int(share * len(data))])
    except UnreadableImage:
        return
    np.testing.assert_array_equal(pixels, decoded(data))  # nothing but a trailer was lost


def test_half_a_jpeg_is_refused() -> None:
    data = WHOLE["JPEG"]
    assert "truncated" in reason_of(data[: len(data) // 2])


@pytest.mark.parametrize("kind", sorted(WHOLE))
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_damaged_picture_raises_nothing_else(kind: str, position: float, value: int) -> None:
    data = bytearray(WHOLE[kind])
    data[int(position * len(data))] = value
    try:
        image = decode_rgb(bytes(data), "picture")
    except UnreadableImage:
        return
    assert image.mode == "RGB"


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first and raises at the second
def test_a_pixel_bomb_is_refused_by_its_header(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(MAX_PIXELS) in reason_of(png_header(side, side))


def test_the_limit_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason_of(png_header(20_000, 20_000)) == f"20000x20000 px is more than the limit of {MAX_PIXELS} pixels"


def test_16_bit_pgm_is_scaled_by_its_range() -> None:
    assert decoded(b"P5 2 1 65535\n" + struct.pack(">HH", 65535, 257))[0, :, 0].tolist() == [255, 1]
