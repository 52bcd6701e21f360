"""The order of file names, and what tells a data set from another by its names and sizes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable

from tessella.registry import Spec

_DIGITS = re.compile(r"[0-9]+")


class NaturalKey:
    """Sorts paths by folder and name, digits as numbers; by the path itself where 1.png and 01.png would be alike.

    The key is text whose plain order is that one: a number becomes a mark that is lower than any character of a name,
    the number of its digits, and its digits. What it made of a folder it remembers, since many files share it.
    """

    def __init__(self) -> None:
        self._folders: dict[str, str] = {"": ""}

    def __call__(self, path: str) -> tuple[str, str]:
        """The key of a path with slashes."""
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self(folder)[0]
        return self._folders[folder] + _with_numbers(name), path


def _with_numbers(name: str) -> str:
    # Text that ends without a number counts as followed by none, which is as much as 0; and then comes the name's end.
    end = "\0\1" if name and name[-1] in "0123456789" else "\0\1\0\1"
    return _DIGITS.sub(_number, name) + end


def _number(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    return f"\0{chr(1 + len(digits))}{digits}"


def identity_of(items: Iterable[tuple[str, int]]) -> Spec:
    """The number of named things, and a hash over their names and sizes in this order."""
    digest = hashlib.blake2b(digest_size=16)
    count = 0
    for name, size in items:
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        count += 1
    return {"count": count, "hash": digest.hexdigest()}


def file_size(path: str | os.PathLike[str]) -> int:
    """In bytes; -1 of what is not there, as of a broken link."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
