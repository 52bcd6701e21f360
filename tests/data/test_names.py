from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessella.data._names import NaturalKey, identity_of
from tessella.data.folder import Folder
from tessella.text import name_to_text, text_to_name
from tessella.tokenization.source import Source

PARTS = st.text(alphabet="01290ab.\u0663-", min_size=1, max_size=6)


def natural(path: str) -> tuple[list[list[tuple[str, int]]], str]:
    """What the key stands for, spelled out: folder by folder, text and number in turn."""
    return [
        [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", part)]
        for part in path.split("/")
    ], path


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), max_size=12))
def test_natural_order(paths: list[str]) -> None:
    assert sorted(paths, key=NaturalKey()) == sorted(paths, key=natural)


def test_natural_order_by_hand() -> None:
    assert sorted(["b", "a2", "a01/0", "1.png", "a1", "01.png"], key=NaturalKey()) == [
        "01.png", "1.png", "a1", "a01/0", "a2", "b",
    ]  # fmt: skip
    assert sorted(["10.png", "9.png", "a10/1", "a9/1"], key=NaturalKey()) == ["9.png", "10.png", "a9/1", "a10/1"]


@given(st.binary(max_size=12) | st.text(alphabet="\\x5cfe9", max_size=12).map(os.fsencode))
def test_every_name_can_be_written_and_read_back(raw: bytes) -> None:
    name = os.fsdecode(raw)
    text = name_to_text(name)
    assert text.encode("utf-8").decode("utf-8") == text
    assert text_to_name(text) == name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"a b.png", "a b.png"),
        ("\u00e9.png".encode(), "\u00e9.png"),
        (b"back\\slash", "back\\slash"),
        (b"\xe9.png", r"\xe9.png"),
        (rb"\xe9.png", r"\x5cxe9.png"),
        (rb"\x5c", r"\x5cx5c"),
        (rb"\x41", r"\x41"),
    ],
)
def test_only_names_that_are_no_text_are_escaped(name: bytes, text: str) -> None:
    assert name_to_text(os.fsdecode(name)) == text


def write(folder: Path, *names: str, size: int = 4) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, 4)).save(folder / name)


def test_identity_is_of_names_and_sizes(tmp_path: Path) -> None:
    write(tmp_path / "a", "1.bmp", "2.bmp", "c/3.bmp")
    (tmp_path / "b").mkdir()
    os.rename(tmp_path / "a", tmp_path / "b" / "moved")
    folder = tmp_path / "b" / "moved"

    def identity() -> dict:
        return Folder(folder, split="test", held_out=1.0).identity()

    first = identity()
    assert first["count"] == 3
    write(tmp_path / "a", "1.bmp", "2.bmp", "c/3.bmp")
    assert Folder(tmp_path / "a", split="test", held_out=1.0).identity() == first  # where it lies has no part in it
    write(folder, "c/3.bmp", size=40)
    assert identity() != first
    write(folder, "c/3.bmp")
    assert identity() == first
    os.rename(folder / "2.bmp", folder / "5.bmp")
    assert identity() != first
    parts = [Folder(folder, split="test", held_out=1.0, crop_px=4)]
    source = Source(parts, section={"path": folder}, split="test", variants=2, whole=False)
    assert source.describe() == {"data": {"path": str(folder)}, "parts": [identity()]}


def test_identity_tells_a_name_from_a_size() -> None:
    assert identity_of([("a", 11)]) != identity_of([("a1", 1)])
    assert identity_of([("a", 1), ("b", 2)]) != identity_of([("b", 2), ("a", 1)])
    assert identity_of([]) == {"count": 0, "hash": identity_of([])["hash"]}
