"""Token shards as training data of generators, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from tessella.data._errors import DataError
from tessella.data.base import Sample, Samples, Split
from tessella.data.tokens import MANIFEST, TokenRow, index_dtype, read_class_names, read_token_space, read_tokens
from tessella.storage import atomic_folder
from tessella.tokenizer import TokenSpace

_CACHE = ".arrays"


class TokenShards(Samples):
    """Rows of token shards by index; one of a picture's variants (its crops) at random in training.

    On the first use the shards are copied into flat arrays in a hidden sub-folder, which are memory-mapped: random
    access without decompression, and no more memory than what is read.

    Args:
        split: "train" or "test", a sub-folder of ``path`` where there is one; without sub-folders all is "train".
        path: folder of shards, see :class:`tessella.data.tokens.TokenWriter`.

    Attributes:
        space: the tokens, their grid included.

    Raises:
        DataError: see :func:`tessella.data.tokens.read_tokens`; rows of different grids, or pictures with different
            numbers of variants.
    """

    def __init__(self, *, split: Split, path: str) -> None:
        folder = Path(path)
        if (folder / split).is_dir():
            folder = folder / split
        elif split == "test":
            raise DataError(f"{folder} has no sub-folder 'test' of token shards")
        space = read_token_space(folder)
        self.class_names = read_class_names(folder)
        arrays = folder / _CACHE / hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
        if not arrays.is_dir():
            shutil.rmtree(folder / _CACHE, ignore_errors=True)  # arrays of other shards
            with atomic_folder(arrays) as temporary:
                _write_arrays(folder, space, temporary)
        self._indices = np.load(arrays / "indices.npy", mmap_mode="r")
        self._labels = np.load(arrays / "labels.npy", mmap_mode="r")
        self._keys: list[str] = json.loads((arrays / "keys.json").read_text(encoding="utf-8"))
        grid = tuple(self._indices.shape[2:-1])
        self.space = TokenSpace(grid, space.num_codebooks, space.codebook_size, space.fingerprint)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._keys)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """``x [*S, K]`` int64 of a variant that ``rng`` chooses, or of the first one."""
        variant = 0 if rng is None else rng.integers(self._indices.shape[1])
        x = torch.from_numpy(self._indices[index, variant].astype(np.int64))
        return Sample(x=x, label=int(self._labels[index]), key=self._keys[index])


def _write_arrays(folder: Path, space: TokenSpace, target: Path) -> None:
    """``indices.npy [pictures, variants, *S, K]``, ``labels.npy`` and ``keys.json``."""
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
    indices = np.lib.format.open_memmap(target / "indices.npy", mode="w+", dtype=dtype, shape=shape)
    for position, picture in enumerate(_pictures(folder)):
        indices[position] = np.stack([row.indices.numpy() for row in picture])
    indices.flush()
    np.save(target / "labels.npy", np.array(labels))
    (target / "keys.json").write_text(json.dumps(keys), encoding="utf-8")


def _pictures(folder: Path) -> Iterator[list[TokenRow]]:
    """The rows of each picture: those that follow each other under one key."""
    for _, rows in groupby(read_tokens(folder), key=lambda row: row.key):
        yield list(rows)
