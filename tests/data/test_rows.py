from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessella.data import parquet
from tessella.data._rows import Row, RowFile
from tessella.data.base import DataError
from tessella.data.loader import evaluation_batches
from tessella.data.parquet import Parquet

ROWS: list[Row] = [(b"first", 3), (None, 0), (b"", -1), (bytes(range(256)) * 20, 2)]


class Source:
    """Counts how often it was read."""

    def __init__(self, rows: list[Row] = ROWS) -> None:
        self.rows = rows
        self.times = 0

    def __call__(self) -> Iterator[Row]:
        self.times += 1
        yield from self.rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"rows")
    return file


def kept(source: Path) -> list[Path]:
    return sorted(source.parent.glob(".a.parquet*"))


def test_rows_are_copied_once_and_shared(source: Path) -> None:
    read = Source()
    first, second = RowFile(source, read), RowFile(source, read)
    assert [first.row(number) for number in (3, 0, 2, 1)] == [ROWS[number] for number in (3, 0, 2, 1)]
    assert [second.row(number) for number in range(4)] == ROWS
    assert read.times == 1
    assert len(kept(source)) == 1


def test_another_source_of_the_same_name_is_copied_anew(source: Path) -> None:
    assert RowFile(source, Source()).row(0) == ROWS[0]
    source.write_bytes(b"other rows")
    assert RowFile(source, Source(ROWS[3:])).row(0) == ROWS[3]
    assert len(kept(source)) == 1  # the old copy is gone


def test_every_flipped_byte_is_seen_and_mended(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    RowFile(source, Source()).row(0)
    (copy,) = kept(source)
    whole = copy.read_bytes()
    rng = np.random.default_rng(0)
    for position in {*range(5), *range(len(whole) - 120, len(whole)), *rng.integers(len(whole), size=75).tolist()}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        copy.write_bytes(damaged)
        rows = RowFile(source, Source())
        assert [rows.row(number) for number in range(4)] == ROWS
        assert copy.read_bytes() == whole
    copy.write_bytes(whole[:-7])
    assert RowFile(source, Source()).row(3) == ROWS[3]


def test_readers_that_start_at_once_copy_once(source: Path) -> None:
    class Slow(Source):
        def __call__(self) -> Iterator[Row]:
            for row in super().__call__():
                time.sleep(0.02)
                yield row

    read = Slow()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: RowFile(source, read).row(3), range(8)))
    assert found == [ROWS[3]] * 8
    assert read.times == 1


KILLED = """
import sys, time
from pathlib import Path
from tessella.data._rows import RowFile
def read():
    yield b"half", 0
    print("writing", flush=True)
    time.sleep(60)
RowFile(Path(sys.argv[1]), read).row(0)
"""


def test_what_a_killed_writer_left_is_taken_over(source: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(source)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    assert [file.name for file in kept(source)] == [".a.parquet.unfinished-rows"]
    assert RowFile(source, Source()).row(3) == ROWS[3]
    assert [file.suffix for file in kept(source)] == [".rows"]


def test_a_source_that_cannot_be_read_leaves_nothing(source: Path) -> None:
    def read() -> Iterator[Row]:
        yield ROWS[0]
        raise DataError("a.parquet cannot be read")

    with pytest.raises(DataError, match="cannot be read"):
        RowFile(source, read).row(0)
    assert kept(source) == []


def test_a_folder_that_cannot_be_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def read_only(path: str, flags: int, *more: int) -> int:
        if str(path).startswith(str(source.parent)) and flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    read = Source()
    rows = RowFile(source, read)
    with caplog.at_level(logging.WARNING, "tessella"):
        assert [rows.row(number) for number in range(4)] == ROWS
    assert "cannot be kept beside it" in caplog.text
    assert kept(source) == []
    assert read.times == 1


def test_a_full_disk_is_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Iterator[Row]:
        raise OSError(28, "No space left on device")
        yield ROWS[0]

    with pytest.raises(DataError, match=r"the rows of .*a\.parquet cannot be kept beside it: No space left on device"):
        RowFile(source, read).row(0)


def bmp(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(buffer, "BMP")
    return buffer.getvalue()


def test_a_large_parquet_file_gives_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for file in range(2):
        rows = [bmp(20 * file + index) for index in range(20)]
        table = pa.table({"image": rows, "label": list(range(20))})
        pq.write_table(table, tmp_path / f"test-{file}.parquet", row_group_size=7)
    in_memory = list(evaluation_batches(Parquet(tmp_path, split="test"), batch_size=10))
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(parquet, "_IN_MEMORY_BYTES", 100)
    dataset = Parquet(tmp_path, split="test")
    dataset.read(0)
    assert len(pickle.dumps(dataset)) < 3000
    on_disk = list(evaluation_batches(pickle.loads(pickle.dumps(dataset)), batch_size=10, num_workers=1))
    for ours, theirs in zip(on_disk, in_memory, strict=True):
        assert (ours["x"] == theirs["x"]).all()
        assert (ours["label"] == theirs["label"]).all()
        assert ours["key"] == theirs["key"]
    assert len(list(tmp_path.glob(".*.rows"))) == 2
