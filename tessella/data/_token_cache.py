"""Token shards as flat arrays on disk, which are memory-mapped: made once, named by their content, checked when opened.

``.arrays/HASH/`` holds ``indices.npy [pictures, variants, *S, K]``, ``labels.npy``, ``keys.json`` and their checksums.
HASH is that of the manifest, and so of all shards: an array belongs to its content, and other shards in the same folder
have other arrays. Any number of processes may open a folder at once: each one that finds no arrays makes its own, under
a name of its own, and the first to finish gives them their place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tessella.data._errors import DataError
from tessella.data._token_manifest import MANIFEST, Manifest, hash_of
from tessella.data._token_rows import TokenRow, index_dtype
from tessella.data.tokens import read_tokens
from tessella.storage import StorageError, read_sealed, write_sealed
from tessella.storage.writing import HOST, is_alive
from tessella.tokenizer import TokenSpace

logger = logging.getLogger("tessella")

_CACHE = ".arrays"
_CHECKSUMS = "checksums.json"
_FILES = ("indices.npy", "labels.npy", "keys.json")
_BUILDING = "building-"
_ATTEMPTS = 3


class Arrays(NamedTuple):
    """``indices [pictures, variants, *S, K]`` and ``labels [pictures]``, both mapped, and the keys."""

    indices: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    keys: list[str]


def open_arrays(folder: Path, manifest: Manifest, space: TokenSpace) -> Path:
    """The folder of the arrays of ``folder``, made where it is missing, made anew where a file in it is damaged.

    Every file is hashed once a process: about a second for 1.5 GB, beside reading them from disk.

    Raises:
        DataError: rows that a generator cannot be trained on, damaged shards, or no room for the arrays.
    """
    place = folder / _CACHE / _name_of(folder, manifest)
    for _ in range(_ATTEMPTS):
        if place.is_dir():
            flaw = _flaw_of(place)
            if flaw is None:
                return place
            logger.warning("%s is damaged (%s); it is made anew from its shards", place, flaw)
            _discard(place)
        _build(folder, space, place)
    raise DataError(f"{place} cannot be made: {_ATTEMPTS} times its files were damaged right after they were written")


def load_arrays(place: Path) -> Arrays:
    """Maps what :func:`open_arrays` found."""
    indices, labels = (np.load(place / name, mmap_mode="r") for name in _FILES[:2])
    return Arrays(indices, labels, json.loads((place / _FILES[2]).read_text(encoding="utf-8")))


def _name_of(folder: Path, manifest: Manifest) -> str:
    if manifest.space is not None:
        return manifest.content_hash()[:16]
    # A manifest without checksums: the shards themselves are read.
    hashes = {shard.name: hash_of(folder / shard.name) for shard in manifest.shards}
    return f"v1-{hash_of(folder / MANIFEST)[:8]}-{hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]}"


def _flaw_of(place: Path) -> str | None:
    """What is wrong with the arrays in ``place``, if anything."""
    try:
        hashes = read_sealed(place / _CHECKSUMS)["files"]
        damaged = [name for name in _FILES if hash_of(place / name) != hashes[name]]
    except (StorageError, DataError, KeyError, TypeError) as error:
        return str(error)
    return f"the checksum of {damaged[0]} does not fit" if damaged else None


def _build(folder: Path, space: TokenSpace, place: Path) -> None:
    """Make the arrays in a folder of this process's own, and give them their place unless another one was faster."""
    # A folder per attempt, not per process: threads of one process may open at once.
    own = place.parent / f"{_BUILDING}{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with _named(folder):
            place.parent.mkdir(exist_ok=True)
            own.mkdir()
            _write_arrays(folder, space, own)
            hashes = {name: hash_of(own / name) for name in _FILES}
            write_sealed(own / _CHECKSUMS, {"files": hashes})
            for file in own.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        try:
            own.rename(place)
        except OSError as error:
            if not place.is_dir():
                raise DataError(f"{place} cannot be made: {error.strerror}") from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
    _remove_leftovers(place)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder / _CACHE}, where the shards are kept as arrays, cannot be written: {error.strerror}"
        ) from error


def _discard(place: Path) -> None:
    """Take ``place`` away in one step; another process may have done so already."""
    away = place.with_name(f"{_BUILDING}{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        place.rename(away)
    except FileNotFoundError:
        return
    shutil.rmtree(away, ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """Arrays of shards that are no longer there, and what processes that were killed left; those at work are spared."""
    for other in place.parent.iterdir():
        if other == place:
            continue
        if other.name.startswith(_BUILDING):
            host, pid, _ = other.name.removeprefix(_BUILDING).rsplit("-", 2)
            if host != HOST or is_alive(int(pid)):
                continue
        shutil.rmtree(other, ignore_errors=True)


def _write_arrays(folder: Path, space: TokenSpace, target: Path) -> None:
    keys: list[str] = []
    labels: list[int] = []
    variants, grid = 0, tuple[int, ...]()
    for picture in _pictures(folder):
        if not keys:
            variants, grid = len(picture), tuple(picture[0].indices.shape)
        for row in picture:
            if len(picture) != variants or tuple(row.indices.shape) != grid:
                raise DataError(
                    f"{folder}: {row.key} has {len(picture)} rows of grid x K = {list(row.indices.shape)}, {keys[0]} "
                    f"{variants} of {list(grid)}; a generator needs one grid and as many rows of every picture: "
                    "tokenize crops of one size"
                )
        keys.append(picture[0].key)
        labels.append(picture[0].label)
    if not keys:
        raise DataError(f"{folder} holds no rows")
    shape, dtype = (len(keys), variants, *grid), index_dtype(space.codebook_size)
    # Written to, not mapped: a full disk is then an error, not the death of the process.
    with (target / _FILES[0]).open("wb") as opened:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(opened, header)
        for picture in _pictures(folder):
            opened.write(np.stack([row.indices.numpy() for row in picture]).astype(dtype).tobytes())
    np.save(target / _FILES[1], np.array(labels))
    (target / _FILES[2]).write_text(json.dumps(keys), encoding="utf-8")


def _pictures(folder: Path) -> Iterator[list[TokenRow]]:
    """The rows of each picture: those that follow each other under one key."""
    for _, rows in groupby(read_tokens(folder), key=lambda row: row.key):
        yield list(rows)
