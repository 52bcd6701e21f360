from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessella.config import build
from tessella.data.base import DataError, UnreadableImage
from tessella.data.webdataset import WebDataset


def png(level: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (6, 4), (level, level, level)).save(target, "PNG")
    return target.getvalue()


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as opened:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            opened.addfile(about, io.BytesIO(data))
    return file


def test_members_called_alike_are_a_sample(tmp_path: Path) -> None:
    members = {
        "a/000.png": png(0), "a/000.cls": b"7", "a/001.seg.png": png(51), "a/001.json": b'{"label": 3}',
        "a/002.txt": b"no picture", "003.cls": b"2\n", "003.png": png(255), "004.png": png(102), ".005.png": png(1),
    }  # fmt: skip
    data = WebDataset(write_tar(tmp_path / "x.tar", members), split="test", held_out=1.0)
    pictures = [data.read(index) for index in range(len(data))]
    assert [(picture.key, picture.label) for picture in pictures] == [
        ("x.tar/a/000", 7), ("x.tar/a/001", 3), ("x.tar/003", 2), ("x.tar/004", -1),
    ]  # fmt: skip
    assert [picture.image.getpixel((0, 0)) for picture in pictures] == [(v, v, v) for v in (0, 51, 255, 102)]
    assert data[2]["x"].shape == (3, 4, 6)
    assert data.identity()["count"] == 4
    grey = WebDataset(tmp_path / "x.tar", split="test", held_out=1.0, channels=1)
    assert grey[1]["x"].shape == (1, 4, 6)
    assert grey[1]["x"][0, 0, 0].item() == pytest.approx(51 / 127.5 - 1)
    write_tar(tmp_path / "x.tar", {**members, "004.png": png(102) + b" "})
    assert WebDataset(tmp_path / "x.tar", split="test", held_out=1.0).identity() != data.identity()


def test_splits_by_file_name_or_by_hash(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", {f"{i}.png": png(i) for i in range(3)})
    train = build("data", {"name": "webdataset", "path": str(tmp_path)}, split="train")
    assert [train.read(index).key for index in (0, 3)] == ["train-0.tar/0", "train-1.tar/0"]
    assert len(WebDataset(tmp_path, split="test")) == 3
    single = write_tar(tmp_path / "one/all.tar", {f"{i}.png": png(i) for i in range(50)})
    parts = [WebDataset(single, split=split, held_out=0.3) for split in ("train", "test")]
    keys = [{part.read(index).key for index in range(len(part))} for part in parts]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 50


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    members = {"a.png": b"no picture", "b.png": png(1), "b.cls": b"dog", "c.png": png(1), "c.json": b"[" * 100_000}
    data = WebDataset(write_tar(tmp_path / "x.tar", members), split="test", held_out=1.0)
    for index, reason in enumerate(["not a picture", "its label cannot be read", "its label has 100000 bytes"]):
        with pytest.raises(UnreadableImage, match=rf"x\.tar/{'abc'[index]}: {reason}"):
            data.read(index)
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:520])
    with pytest.raises(UnreadableImage, match=r"x\.tar ends before it does"):
        data.read(0)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"x\.tar: No such file"):
        data.read(0)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(np.random.default_rng(0).bytes(2000))
    write_tar(tmp_path / "b.tar", {"a.png": png(0)}, "w:gz")
    write_tar(tmp_path / "c.tar", {"a.json": json.dumps({}).encode()})
    for name, message in (("a", "is no tar file"), ("b", "or compressed"), ("c", "no picture in"), ("d", "not exist")):
        with pytest.raises(DataError, match=message):
            WebDataset(tmp_path / f"{name}.tar", split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file ending in \.tar"):
        WebDataset(tmp_path / "empty", split="train")
