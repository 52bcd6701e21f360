"""``tokens.json``: what a folder of token shards holds, with the checksums that show whether it still does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessella.data._errors import DataError
from tessella.registry import Spec
from tessella.storage import StorageError, read_sealed, seal, write_sealed
from tessella.tokenizer import TokenSpace

logger = logging.getLogger("tessella")

MANIFEST = "tokens.json"
FORMAT = "tessella-tokens"
VERSION = 2
_WITHOUT_CHECKSUMS = 1

_SHARD_NAME = re.compile(r"tokens-\d{5,}\.parquet")
_HASH = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20
_CLOCK_TICK_NS = 100_000_000  # file systems keep times no finer than some milliseconds

# What this process has read whole and found right: file, size and times -> its hash.
_verified: dict[tuple[str, int, int, int], str] = {}


def shard_name(number: int) -> str:
    """The file name of the shard ``number``."""
    return f"tokens-{number:05d}.parquet"


def foreign_shards(folder: Path, own: set[str]) -> list[str]:
    """Files in ``folder`` that are called as shards are and are not among ``own``."""
    return sorted(file.name for file in folder.glob("tokens-*.parquet") if file.name not in own)


@dataclass(frozen=True)
class Shard:
    """One file of rows.

    Attributes:
        name: in the folder.
        num_rows: it holds; None where an old manifest does not say.
        num_bytes: of the file; None likewise.
        sha256: of its bytes; empty likewise.
        inputs: the signals it is made from: from, up to but not including, in the data's order; None where unknown.
        num_skipped: those of them that could not be read.
    """

    name: str
    num_rows: int | None = None
    num_bytes: int | None = None
    sha256: str = ""
    inputs: tuple[int, int] | None = None
    num_skipped: int = 0

    def to_json(self) -> Spec:
        """As the manifest keeps it."""
        inputs = None if self.inputs is None else list(self.inputs)
        return {"name": self.name, "rows": self.num_rows, "bytes": self.num_bytes, "sha256": self.sha256,
                "inputs": inputs, "skipped": self.num_skipped}  # fmt: skip

    @classmethod
    def from_json(cls, entry: Spec) -> Shard:
        """What :meth:`to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: something else.
        """
        inputs = None if entry["inputs"] is None else (int(entry["inputs"][0]), int(entry["inputs"][1]))
        name, counts = _checked_name(entry["name"]), [int(entry[what]) for what in ("rows", "bytes", "skipped")]
        shard = cls(name, counts[0], counts[1], entry["sha256"], inputs, counts[2])
        if not _HASH.fullmatch(shard.sha256):
            raise ValueError(f"{shard.name} has no checksum")
        return shard

    def check_size(self, folder: Path) -> None:
        """Raise DataError unless the file is there, in its length: that costs no reading."""
        file = folder / self.name
        if not file.is_file():
            raise DataError(f"{file} is missing, which {MANIFEST} names")
        if self.num_bytes is not None and (size := file.stat().st_size) != self.num_bytes:
            raise DataError(
                f"{file} is no Parquet file, or not a whole one: it has {size} bytes, {self.num_bytes} in {MANIFEST}"
            )

    def check_bytes(self, folder: Path) -> None:
        """Raise DataError unless the file's bytes are those that were written; each file is hashed once a process."""
        if self.sha256 and hash_of(folder / self.name) != self.sha256:
            raise DataError(f"{folder / self.name} is damaged: its checksum is not the one in {MANIFEST}")


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        space: of the tokens; its grid is empty, since every row has its own. None where only the shards say it.
        shards: in the order of their rows.
        class_names: what the labels are called.
        medium: what the signals were, the recipe's ``[medium]``.
        split: which part of the data was taken: "train", "test" or "all"; empty where unknown.
        source: the data it was made from.
        settings: what else decided about the rows; the same folder comes out of the same ones.
        skipped: key and reason of what could not be read.
        version: of the format.
    """

    space: TokenSpace | None
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] = ()
    medium: Spec = field(default_factory=dict)
    split: str = ""
    source: Spec = field(default_factory=dict)
    settings: Spec = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    version: int = VERSION

    def to_json(self) -> Spec:
        """The file's content, without its checksum."""
        assert self.space is not None
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": self.space.fingerprint,
            "codebook_size": self.space.codebook_size,
            "num_codebooks": self.space.num_codebooks,
            "class_names": list(self.class_names),
            "medium": self.medium,
            "split": self.split,
            "source": self.source,
            "settings": self.settings,
            "rows": sum(shard.num_rows or 0 for shard in self.shards),
            "shards": [shard.to_json() for shard in self.shards],
            "skipped": [list(pair) for pair in self.skipped],
        }

    def write(self, folder: Path) -> None:
        """As ``folder/tokens.json``, complete or not at all.

        Raises:
            StorageError: it could not be written.
        """
        write_sealed(folder / MANIFEST, self.to_json())

    def content_hash(self) -> str:
        """Names what is in the shards: a cache made from them belongs to it, and to nothing else."""
        return str(seal(self.to_json())["checksum"])


def read_manifest(folder: Path) -> Manifest:
    """What ``folder/tokens.json`` says, once it is sure that it says what was written.

    Raises:
        DataError: no folder, no manifest in it, a damaged one, or one of another version; shards that are missing or
            have another length.
    """
    manifest = parse_manifest(folder)
    for shard in manifest.shards:
        shard.check_size(folder)
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """:func:`read_manifest`, without a look at the shards."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"no tokens at {folder}: neither a folder of token shards nor one of them")
    if not file.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it holds no tokens, or the run that wrote them was interrupted")
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
        if content["format"] != FORMAT or content["version"] not in (_WITHOUT_CHECKSUMS, VERSION):
            raise DataError(
                f"{file} is of format {content['format']!r}, version {content['version']!r}; read are {FORMAT!r}, "
                f"versions {_WITHOUT_CHECKSUMS} and {VERSION}"
            )
        if content["version"] == _WITHOUT_CHECKSUMS:
            return _first_version(file, content)
        return _present_version(read_sealed(file))
    except StorageError as error:
        raise DataError(str(error)) from error
    except (OSError, KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is damaged: {error!r}") from error


def _present_version(content: Spec) -> Manifest:
    space = TokenSpace((), content["num_codebooks"], content["codebook_size"], content["tokenizer"])
    shards = tuple(Shard.from_json(entry) for entry in content["shards"])
    return Manifest(
        space, shards, tuple(content["class_names"]), content["medium"], content["split"], content["source"],
        content["settings"], tuple((key, reason) for key, reason in content["skipped"]),
    )  # fmt: skip


def _first_version(file: Path, content: Spec) -> Manifest:
    if file not in _warned:
        logger.warning("%s is of version 1, without checksums: damaged shards may go unnoticed", file)
        _warned.add(file)
    shards = tuple(Shard(_checked_name(name)) for name in content["shards"])
    return Manifest(None, shards, tuple(content.get("class_names", ())), version=_WITHOUT_CHECKSUMS)


_warned: set[Path] = set()


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a shard")
    return name


def hash_of(file: Path) -> str:
    """SHA-256 of a file in hexadecimal, read once a process for as long as its size and times stay as they were.

    Raises:
        DataError: it cannot be read.
    """
    try:
        status = os.stat(file)
        known = (os.path.abspath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if known not in _verified:
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK_BYTES):
                    digest.update(chunk)
            if time.time_ns() - status.st_mtime_ns < _CLOCK_TICK_NS:
                return digest.hexdigest()  # so young that another write might leave the same times
            _verified[known] = digest.hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return _verified[known]
