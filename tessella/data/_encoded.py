"""Encoded pictures from files: only regular ones, only so large, only of formats that pictures come in."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from tessella.data._errors import UnreadableImage

# Four channels of 16 bits at the limit of pixels fit; nothing larger is read.
MAX_FILE_BYTES = 2**30

# What the first bytes of a file say that it is. Formats without such a mark, and those that run programs or hide other
# files, are none that pictures come in.
_MAGIC = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("WEBP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("BMP", re.compile(rb"BM")),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("AVIF", re.compile(rb".{4}ftypavi[fs]", re.DOTALL)),
    ("JPEG2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51")),
    # The whole header: Pillow looks for its end in what may be a gigabyte of comment. Not P1 to P3, numbers as text.
    ("PPM", re.compile(rb"P4(?:\s+(?:#[^\r\n]*[\r\n]\s*)*\d+){2}\s|P[56](?:\s+(?:#[^\r\n]*[\r\n]\s*)*\d+){3}\s")),
    ("NPY", re.compile(rb"\x93NUMPY")),
)
_HEAD_BYTES = 1024

FORMATS = tuple(name for name, _ in _MAGIC)


def read_encoded(source: bytes | str | os.PathLike[str], key: str) -> tuple[bytes, str]:
    """The bytes of a picture, and which of :data:`FORMATS` they begin as.

    Args:
        source: the bytes themselves, or a file's path.
        key: the picture's name in messages.

    Raises:
        UnreadableImage: no such file, not a regular one, one of more than :data:`MAX_FILE_BYTES`, one that begins as no
            picture does, or one that changes while it is read.
    """
    if isinstance(source, bytes):
        return source, _format(source[:_HEAD_BYTES], key)
    try:
        # A pipe that nobody writes to would otherwise be waited for.
        number = os.open(Path(source), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(number, "rb") as file:
            before = os.fstat(number)
            if not stat.S_ISREG(before.st_mode):
                raise UnreadableImage(key, "not a regular file")
            if before.st_size > MAX_FILE_BYTES:
                raise UnreadableImage(key, f"{before.st_size} bytes, more than the limit of {MAX_FILE_BYTES}")
            head = file.read(min(_HEAD_BYTES, before.st_size))
            kind = _format(head, key)
            data = head + file.read(before.st_size - len(head))
            after = os.fstat(number)
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(key, getattr(error, "strerror", None) or str(error)) from error
    if len(data) != before.st_size or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UnreadableImage(key, "changed while it was read")
    return data, kind


def _format(head: bytes, key: str) -> str:
    for name, magic in _MAGIC:
        if magic.match(head):
            return name
    raise UnreadableImage(key, f"not a picture in any format that can be read ({', '.join(FORMATS)})")
