"""Files that somebody else made: none hangs, eats the memory, leads elsewhere or writes on the terminal."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from tessella.data import _encoded
from tessella.data._encoded import MAX_FILE_BYTES, read_encoded
from tessella.data.base import DataError, UnreadableImage, list_skipped
from tessella.data.decode import decode, decode_rgb
from tessella.data.folder import Folder
from tessella.data.loader import evaluation_batches
from tessella.data.lsun import LSUN
from tessella.data.parquet import Parquet
from tessella.text import printable


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def refused(file: Path, **options: int) -> str:
    """Why; and at once."""
    start = time.process_time()
    with pytest.raises(UnreadableImage) as caught:
        decode(file, file.name, **options)
    assert time.process_time() - start < 0.5
    return caught.value.reason


def sparse(file: Path, head: bytes, size: int) -> Path:
    file.write_bytes(head)
    os.truncate(file, size)
    return file


def test_much_text_named_as_a_picture(tmp_path: Path) -> None:
    file = sparse(tmp_path / "a.jpg", b"P6 # once upon a time, " * 50, 100 * 2**20)
    assert refused(file).startswith("not a picture in any format that can be read (JPEG, PNG, WEBP")
    file.write_bytes(b"P6 #" + b"#" * 2**20)  # a comment without end
    assert refused(file).startswith("not a picture in any format")
    file.write_bytes(b"P3 1 1 255 1 2 3\n")  # numbers as text
    assert refused(file).startswith("not a picture in any format")


def test_a_file_of_6_gb_is_refused_by_its_size(tmp_path: Path) -> None:
    file = sparse(tmp_path / "a.jpg", b"\xff\xd8\xff", 6 * 2**30)
    assert refused(file) == f"{6 * 2**30} bytes, more than the limit of {MAX_FILE_BYTES}"


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    assert refused(tmp_path / "a.jpg") == refused(tmp_path / "zero.jpg") == "not a regular file"
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg")
    dataset = Folder(tmp_path, split="test", held_out=1.0)
    assert [dataset.read(index).key for index in range(len(dataset))] == ["b.jpg"]
    assert refused(tmp_path) in ("not a regular file", "Is a directory")


@pytest.mark.parametrize(
    "head",
    [
        b"BM" + b"\xff" * 60,
        b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 600,
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999, 99999, 99), }".ljust(117) + b"\n",
        b"II*\0\x08\0\0\0\xff\xff" + b"\x01" * 100,
    ],
)  # fmt: skip
def test_headers_that_promise_much(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a.png").write_bytes(head)
    assert refused(tmp_path / "a.png", channels=99)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    find_format = _encoded._format

    def change(size: int) -> None:
        def changing(head: bytes, key: str) -> str:
            os.truncate(file, size)
            return find_format(head, key)

        monkeypatch.setattr(_encoded, "_format", changing)

    for size in (20, 5000):
        file.write_bytes(png())
        change(size)
        monkeypatch.setattr(_encoded, "_HEAD_BYTES", 16)
        with pytest.raises(UnreadableImage, match=r"^a\.png: changed while it was read$"):
            read_encoded(file, "a.png")


def test_a_file_that_vanishes_is_skipped_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    dataset = Folder(tmp_path, split="test", held_out=1.0)
    (tmp_path / "a.png").unlink()
    (batch,) = evaluation_batches(dataset, batch_size=2)
    assert (batch["key"], batch["skipped"]) == (["b.png"], [("a.png", "No such file or directory")])


@pytest.mark.parametrize("column", ["image", "image.bytes"])
def test_paths_in_the_place_of_bytes_are_not_followed(tmp_path: Path, column: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "secret.png").write_bytes(png())
    path = str(tmp_path / "secret.png")
    table = pa.table({"image": [path] if column == "image" else [{"bytes": path, "path": path}]})
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(DataError, match=rf"test\.parquet: column '{column}' must hold bytes, .*, not string"):
        Parquet(tmp_path, split="test")


def test_a_struct_with_a_path_alone_is_not_followed(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": "/dev/zero"}], kind)})
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(UnreadableImage, match="the row holds no bytes"):
        Parquet(tmp_path, split="test").read(0)


NAMES = b"a\nb.png", b"\x1b[31mred.png", b"caf\xe9.png", "\u00e9t\u00e9.png".encode(), b"back\\xe9slash.png"


def test_names_are_kept_and_shown_harmlessly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in NAMES:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(png())
    dataset = Folder(tmp_path, split="test", held_out=1.0)
    keys = {dataset.read(index).key for index in range(len(dataset))}
    assert keys == {"a\nb.png", "\x1b[31mred.png", r"caf\xe9.png", "\u00e9t\u00e9.png", r"back\x5cxe9slash.png"}
    for key in keys:
        key.encode()  # fit for every file of text
    for name in NAMES:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"text")
    (message,) = [str(error) for error in [_reading(dataset, key_part="red")]]
    assert message.startswith(r"\x1b[31mred.png: not a picture")
    (batch,) = evaluation_batches(_with_one_good(dataset, tmp_path), batch_size=9)
    shown = list_skipped(batch["skipped"])
    assert shown.isprintable()
    assert r"a\nb.png: not a picture" in shown


def _reading(dataset: Folder, *, key_part: str) -> UnreadableImage:
    for index in range(len(dataset)):
        try:
            dataset.read(index)
        except UnreadableImage as error:
            if key_part in error.key:
                return error
    raise AssertionError("nothing was refused")


def _with_one_good(dataset: Folder, folder: Path) -> Folder:
    (folder / "good.png").write_bytes(png())
    return Folder(folder, split="test", held_out=1.0)


def test_a_class_of_any_name_has_a_name_of_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/test/\xff\n"))
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(png())
    dataset = Folder(tmp_path, split="test")
    assert dataset.class_names == ("\\xff\n",)
    assert dataset.read(0).label == 0


def test_messages_about_folders_are_printable(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2Jb"
    folder.mkdir()
    with pytest.raises(DataError) as caught:
        Folder(folder, split="test")
    assert str(caught.value).isprintable()
    with pytest.raises(DataError) as caught:
        LSUN(split="test", path=folder)
    assert str(caught.value).isprintable()
    assert printable("a\x1b\n\udcff") == r"a\x1b\n\udcff"


def test_a_reason_with_escape_codes_is_printable() -> None:
    with pytest.raises(UnreadableImage) as caught:
        decode_rgb("/nowhere/\x1b[31m", "\x1b[31m")
    assert str(caught.value).isprintable()
