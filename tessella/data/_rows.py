"""Rows of a file that can only be read from its beginning, kept where each can be reached: beside it, on disk."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
import sys
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from tessella.data._errors import DataError

logger = logging.getLogger("tessella")

Row: TypeAlias = tuple[bytes | None, int]  # encoded picture, label

_INDEX = np.dtype([("length", "<i8"), ("label", "<i8"), ("checksum", "<u4")])  # the length of no picture is -1
_FOOTER = struct.Struct("<8sQI")  # what it is, number of rows, checksum of the index
_MAGIC = b"TESSROW1"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

_Index = np.ndarray[tuple[int], np.dtype[Any]]


class RowFile:
    """The rows of one file, by number: of these alone a reader needs memory.

    They are copied once, in order, into a hidden file beside the source that all readers and later starts share; it
    holds as much as the source does uncompressed. It belongs to the source's size and time of change, is made under a
    lock and appears whole; every row has a checksum, and a damaged file is made anew. Where none can be written beside
    the source, each process makes its own temporary one.

    Args:
        source: the file.
        read: all its rows, in order.
    """

    def __init__(self, source: Path, read: Callable[[], Iterator[Row]]) -> None:
        self.source = source
        self._read = read
        self._index: _Index | None = None
        self._starts: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None
        self._own: BinaryIO | None = None  # the temporary file, which has no name

    def row(self, number: int) -> Row:
        """The picture's bytes, None where the row has none, and its label.

        Raises:
            DataError: the source cannot be read, or there is no space for the copy.
        """
        row = self._kept(number)
        if row is None:
            logger.warning("%s is damaged and is made anew", self._path())
            self._path().unlink(missing_ok=True)
            self._index = None
            row = self._kept(number)
        if row is None:
            raise DataError(f"{self._path()} does not keep what is written to it")
        return row

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: a worker process opens it itself."""
        return {**self.__dict__, "_index": None, "_starts": None, "_own": None}

    def _kept(self, number: int) -> Row | None:
        """The row; None if the copy is damaged there."""
        if self._index is None:
            self._index = self._open()
            lengths = np.maximum(self._index["length"], 0)
            self._starts = np.cumsum(lengths) - lengths
        assert self._starts is not None
        entry = self._index[number]
        length, label = int(entry["length"]), int(entry["label"])
        if length < 0:
            return None, label
        try:
            data = self._bytes(int(self._starts[number]), length)
        except OSError:
            return None
        return (data, label) if zlib.crc32(data) == entry["checksum"] else None

    def _bytes(self, start: int, length: int) -> bytes:
        if self._own is not None:
            self._own.seek(start)
            return self._own.read(length)
        with open(self._path(), "rb") as file:  # a set of many files must not hold them all open
            file.seek(start)
            return file.read(length)

    def _path(self) -> Path:
        status = self.source.stat()
        stamp = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
        return self.source.with_name(f".{self.source.name}.{stamp}.rows")

    def _open(self) -> _Index:
        try:
            path = self._path()
            index = _read_index(path)
            return index if index is not None else self._make(path)
        except OSError as error:
            if error.errno in _READ_ONLY:
                logger.warning("the rows of %s cannot be kept beside it (%s)", self.source, error.strerror)
                return self._make_own()
            raise DataError(f"the rows of {self.source} cannot be kept beside it: {error.strerror}") from error

    def _make(self, path: Path) -> _Index:
        unfinished = self.source.with_name(f".{self.source.name}.unfinished-rows")
        while True:
            with open(os.open(unfinished, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                _lock(file)
                index = _read_index(path)
                if index is not None:  # made by another while this one waited
                    return index
                if not (unfinished.exists() and os.path.samestat(os.fstat(file.fileno()), unfinished.stat())):
                    continue  # it was another one's, and is gone
                try:
                    file.truncate()
                    index = _write(file, self._read())
                    file.flush()
                    for old in self.source.parent.glob(f".{self.source.name}.*.rows"):
                        old.unlink()
                    unfinished.rename(path)
                except BaseException:
                    unfinished.unlink()
                    raise
                return index

    def _make_own(self) -> _Index:
        self._own = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        weakref.finalize(self, self._own.close)
        index = _write(self._own, self._read())
        self._own.flush()
        return index


def _write(file: BinaryIO, rows: Iterator[Row]) -> _Index:
    entries = []
    for data, label in rows:
        file.write(data or b"")
        entries.append((-1 if data is None else len(data), label, zlib.crc32(data or b"")))
    index: _Index = np.array(entries, dtype=_INDEX)
    file.write(index.tobytes())
    file.write(_FOOTER.pack(_MAGIC, len(index), zlib.crc32(index.tobytes())))
    return index


def _read_index(path: Path) -> _Index | None:
    """That of a whole file; None where there is none, or a damaged one."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _FOOTER.size:
            return None
        file.seek(size - _FOOTER.size)
        magic, count, checksum = _FOOTER.unpack(file.read())
        start = size - _FOOTER.size - count * _INDEX.itemsize
        if magic != _MAGIC or start < 0:
            return None
        file.seek(start)
        data = file.read(count * _INDEX.itemsize)
    index: _Index = np.frombuffer(data, _INDEX)
    whole = zlib.crc32(data) == checksum and int(np.maximum(index["length"], 0).sum()) == start
    return index if whole else None


def _lock(file: BinaryIO) -> None:
    """Wait until no other process makes the same; the system lets go of it even if this one is killed."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
