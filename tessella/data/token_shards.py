"""Token shards as training data of generators, memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessella.data._errors import DataError
from tessella.data._token_cache import load_arrays, open_arrays
from tessella.data.base import Sample, Samples, Split
from tessella.data.tokens import read_manifest, read_token_space
from tessella.registry import Spec
from tessella.tokenizer import TokenSpace


class TokenShards(Samples):
    """Rows of token shards by index; one of a picture's variants (its crops) at random in training.

    On the first use the shards are copied into flat arrays in a hidden sub-folder, which are memory-mapped: random
    access without decompression, and no more memory than what is read. Opening reads the arrays once, to compare their
    checksums (about 1.5 GB a second); damaged ones are made anew.

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
        manifest, space = read_manifest(folder), read_token_space(folder)
        self.class_names = manifest.class_names
        self._place = open_arrays(folder, manifest, space)
        self._arrays = load_arrays(self._place)
        grid = tuple(self._arrays.indices.shape[2:-1])
        self.space = TokenSpace(grid, space.num_codebooks, space.codebook_size, space.fingerprint)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._arrays.keys)

    def identity(self) -> Spec:
        """The number of pictures, and what names their content."""
        return {"count": len(self), "content": self._place.name}

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """``x [*S, K]`` int64 of a variant that ``rng`` chooses, or of the first one."""
        indices, labels, keys = self._arrays
        variant = 0 if rng is None else rng.integers(indices.shape[1])
        x = torch.from_numpy(indices[index, variant].astype(np.int64))
        return Sample(x=x, label=int(labels[index]), key=keys[index])

    def __getstate__(self) -> dict[str, Any]:
        """Without the arrays: a worker process maps them itself instead of receiving a copy."""
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the arrays, which this object's first process has checked."""
        self.__dict__.update(state)
        self._arrays = load_arrays(self._place)
